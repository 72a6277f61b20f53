"""What a model is: its attention layers, the rows of its batches, its steps, and where one is found.

:func:`embedded_path` and its like are :mod:`fpe_pipeline.embedded`'s, and public under this name.
"""

from ..embedded import EARLIER, EMBEDDED, EMBEDDED_SD3, embedded_path, judge_path

__all__ = ["EARLIER", "EMBEDDED", "EMBEDDED_SD3", "embedded_path", "judge_path"]
