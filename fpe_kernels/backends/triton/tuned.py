"""What was measured faster than the rules of :mod:`.configs`; written by ``python -m benchmarks.tune --apply ROWS``."""

from __future__ import annotations

FORWARD: dict[tuple[str, int, int, int], tuple[int, int, int, int, bool, bool, int, bool]] = {}
"""(architecture, head width, packed width, length class) -> the fields of a ``Config``, for 16-bit ``apply``."""

TOGETHER: dict[tuple[str, int, int, int], bool] = {}
"""(architecture, head width, widest packed width, length class) -> whether a mixed batch is one launch."""
