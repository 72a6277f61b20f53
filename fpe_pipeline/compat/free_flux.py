"""FreeFlux: what its folder for non-rigid editing registers, on current diffusers.

``from pipeline_flux_non_rigid import …``, and so for ``transformer_flux_non_rigid`` and ``non_rigid_attn_utils``,
becomes ``from fpe_pipeline.compat.free_flux import …``. See ``docs/compat/free-flux.md``.

Reference: Wei et al., "FreeFlux: Understanding and Exploiting Layer-Specific Roles in RoPE-Based MMDiT for Versatile
Image Editing", ICCV 2025, arXiv 2503.16153.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from diffusers import FluxPipeline, FluxTransformer2DModel

from ..edits.base import Products, Windows
from ..edits.image_memory import FreeFluxEdit
from ..models.adapters.families import adapter_of
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from ..session.session import EditingSession
from .given import number, numbers
from .names import unknown_name
from .sessions import HalvesSession, RegisteredEdit, has_targets
from .switch import chosen_compat

__all__ = ["FluxPipeline", "FluxTransformer2DModel", "register_non_rigid_attention_control"]

_BY_EDIT = "put `with fpe_pipeline.editing(pipe, FreeFluxEdit({}, mask=…)):` around calls"
__getattr__ = unknown_name(
    __name__,
    "FreeFlux",
    __all__,
    {
        "register_add_object_attention_control": _BY_EDIT.format('"add"'),
        "register_bg_replace_attention_control": _BY_EDIT.format('"background"'),
    },
)


@dataclass(frozen=True)
class _ListedSteps(FreeFluxEdit):
    """The non-rigid edit at listed steps.

    Args:
        listed: the steps' numbers.
    """

    listed: frozenset[int] = field(default=frozenset(), kw_only=True)

    def active(self, step: Step) -> bool:
        return step.index in self.listed

    def windows(self) -> Windows:
        return ((f"step_idx={sorted(self.listed)}", self.active),) if self.listed else ()

    def phase(self, step: Step) -> Hashable:
        return (self.active(step),)

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Products:
        return super().products(site, step, roles) if has_targets(roles) else {}


def register_non_rigid_attention_control(
    model: Any,
    start_step: int = 4,
    start_layer: int = 0,
    layer_idx: Iterable[int] | None = None,
    step_idx: Iterable[int] | None = None,
    total_layers: int = 57,
    total_steps: int = 50,
    *,
    compat: str | None = None,
) -> RegisteredEdit:
    """In some layers and steps, targets ask for the keys and values of the first prompt's image, from here on.

    Args:
        model: a pipeline of FLUX.1.
        start_step, start_layer: from which on, where the lists are left out.
        layer_idx: numbers among all blocks, the dual ones first.
        step_idx: numbers of steps.
        total_layers: blocks of the transformer.
        total_steps: of the run; steps are read from the scheduler, so it ends the default of ``step_idx`` alone.
        compat: "original" takes the first half of the prompts as sources of the second half, one each.

    Returns:
        What restores the transformer: ``.restore()``, or a ``with`` block. Registering anew takes it off as well.

    Raises:
        TypeError: no pipeline of FLUX.1.
        ValueError: layers that the transformer has not, or another number of them; layers and steps that are no lists
            of whole numbers, or negative ones.
    """
    compat = chosen_compat(compat)
    adapter = adapter_of(model)
    if adapter.family != "flux":
        raise TypeError(f"expected a pipeline of FLUX.1, got one with {type(adapter.module).__name__}")
    if total_layers != len(adapter.sites):
        raise ValueError(
            f"expected total_layers to be {len(adapter.sites)}, this transformer's blocks, got {total_layers}"
        )
    start_step, start_layer = number("start_step", start_step), number("start_layer", start_layer)
    total_layers, total_steps = number("total_layers", total_layers), number("total_steps", total_steps)
    layers = tuple(range(start_layer, total_layers) if layer_idx is None else numbers("layer_idx", layer_idx))
    if not layers or not all(0 <= layer < total_layers for layer in layers):
        raise ValueError(f"expected layer_idx to be among 0 to {total_layers - 1}, got {list(layers)}")
    steps = frozenset(range(start_step, total_steps) if step_idx is None else numbers("step_idx", step_idx))
    if not all(step >= 0 for step in steps):
        raise ValueError(f"expected steps from 0 on, got {sorted(steps)}")
    edit = _ListedSteps(layers=layers, listed=steps)
    session = (HalvesSession if compat == "original" else EditingSession)(model, edit)
    return RegisteredEdit(session)
