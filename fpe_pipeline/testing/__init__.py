"""A dense oracle for edits: the kernels' output in a run, held in float64 against maps that are written out.

::

    from fpe_pipeline.testing import check_edit

    def test_my_edit():
        check_edit(MyEdit())
"""

from .check import TOLERANCE, Difference, EditCheck, check_edit
from .dense import DenseLayer
from .models import tiny_unet, words_tokenizer

__all__ = ["TOLERANCE", "DenseLayer", "Difference", "EditCheck", "check_edit", "tiny_unet", "words_tokenizer"]
