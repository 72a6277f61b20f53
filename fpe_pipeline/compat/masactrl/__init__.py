"""MasaCtrl: the repository's editors, registration and pipeline, on current diffusers.

``from masactrl.masactrl import …``, and so for ``masactrl_utils`` and ``diffuser_utils``, becomes
``from fpe_pipeline.compat.masactrl.masactrl import …``.

Reference: Cao et al., "MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and Editing",
ICCV 2023.
"""

from __future__ import annotations

from ..names import unknown_name
from .diffuser_utils import MasaCtrlPipeline
from .masactrl import (
    MutualSelfAttentionControl,
    MutualSelfAttentionControlMask,
    MutualSelfAttentionControlMaskAuto,
    MutualSelfAttentionControlUnion,
)
from .masactrl_utils import AttentionBase, AttentionStore, regiter_attention_editor_diffusers

__all__ = [
    "AttentionBase",
    "AttentionStore",
    "MasaCtrlPipeline",
    "MutualSelfAttentionControl",
    "MutualSelfAttentionControlMask",
    "MutualSelfAttentionControlMaskAuto",
    "MutualSelfAttentionControlUnion",
    "regiter_attention_editor_diffusers",
]

__getattr__ = unknown_name(__name__, "MasaCtrl", __all__)
