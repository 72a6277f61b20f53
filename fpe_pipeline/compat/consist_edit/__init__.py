"""ConsistEdit: its solvers, its editors and the state that its scripts set, on current diffusers.

``from consistEdit.solver import …``, and so for ``attention_control`` and ``global_var``, becomes
``from fpe_pipeline.compat.consist_edit.solver import …``. See ``docs/compat/consist-edit.md``.

Reference: Yin et al., "ConsistEdit: Highly Consistent and Precise Training-free Visual Editing", SIGGRAPH Asia 2025,
arXiv 2510.17803.
"""

from __future__ import annotations

from ..names import unknown_name
from .attention_control import regiter_attention_editor_diffusers_flux, regiter_attention_editor_diffusers_sd3
from .global_var import GlobalVars
from .solver import register_flux_solver, register_sd3_solver

__all__ = [
    "GlobalVars",
    "register_flux_solver",
    "register_sd3_solver",
    "regiter_attention_editor_diffusers_flux",
    "regiter_attention_editor_diffusers_sd3",
]

__getattr__ = unknown_name(__name__, "ConsistEdit", __all__)
