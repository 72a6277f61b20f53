"""Prompt-to-Prompt (Hertz et al., ICLR 2023), as its repository and notebooks have it, on current diffusers.

``import ptp_utils``, ``import seq_aligner`` become ``from fpe_pipeline.compat.prompt_to_prompt import ptp_utils,
seq_aligner``; the notebooks' classes are here too. See ``docs/compat/prompt-to-prompt.md``.
"""

from ..names import unknown_name
from . import ptp_utils, seq_aligner
from .attention_views import aggregate_attention, show_cross_attention, show_self_attention_comp
from .controllers import AttentionControl, AttentionStore, EmptyControl, SpatialReplace
from .edits import AttentionControlEdit, AttentionRefine, AttentionReplace, AttentionReweight, make_controller
from .local_blend import LocalBlend
from .null_text import NullInversion
from .word_tokens import get_equalizer

__all__ = [
    "AttentionControl",
    "AttentionControlEdit",
    "AttentionRefine",
    "AttentionReplace",
    "AttentionReweight",
    "AttentionStore",
    "EmptyControl",
    "LocalBlend",
    "NullInversion",
    "SpatialReplace",
    "aggregate_attention",
    "get_equalizer",
    "make_controller",
    "ptp_utils",
    "seq_aligner",
    "show_cross_attention",
    "show_self_attention_comp",
]

__getattr__ = unknown_name(
    __name__,
    "Prompt-to-Prompt",
    __all__,
    {"run_and_display": "a notebook's cell: text2image_ldm_stable and view_images are its two lines"},
)
