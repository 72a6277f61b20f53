"""StyleAligned: the authors' ``sa_handler``, on any diffusers pipeline with a UNet.

``import sa_handler`` becomes ``from fpe_pipeline.compat import style_aligned as sa_handler``.

Reference: Hertz et al., "Style Aligned Image Generation via Shared Attention", CVPR 2024.
"""

from __future__ import annotations

from ..names import unknown_name
from .handler import Handler, StyleAlignedArgs

__all__ = ["Handler", "StyleAlignedArgs"]

_INSIDE = "it is a part of Handler(pipe).register(StyleAlignedArgs(…)), which does all of it"

__getattr__ = unknown_name(
    __name__,
    "sa_handler",
    __all__,
    dict.fromkeys(
        (
            "DefaultAttentionProcessor",
            "SharedAttentionProcessor",
            "adain",
            "concat_first",
            "expand_first",
            "init_attention_processors",
            "register_shared_norm",
        ),
        _INSIDE,
    ),
)
