"""ConsistEdit's editors without mask: image queries and keys of the source, in the first ``TEST_QK_STEP`` steps."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

from ...edits.base import Products, Windows
from ...edits.consist_edit import ConsistEdit
from ...models.adapters.adapter import ModelCall
from ...models.adapters.families import adapter_of
from ...models.roles import BatchRoles
from ...models.sites import Site
from ...models.steps import Step
from ...session.session import EditingSession
from ..names import unknown_name
from ..sessions import HalvesSession, RegisteredEdit, has_targets
from ..switch import chosen_compat
from .global_var import GlobalVars

__all__ = [
    "regiter_attention_editor_diffusers_cog",
    "regiter_attention_editor_diffusers_flux",
    "regiter_attention_editor_diffusers_sd3",
]

_MASKS = (
    "masks come with `fpe_pipeline.editing(pipe, ConsistEdit(alpha, mask=WordMask(prompt, word, tokenizer)))`, put "
    "around calls"
)
__getattr__ = unknown_name(
    __name__,
    "consistEdit.attention_control",
    __all__,
    {
        **dict.fromkeys(
            (
                "regiter_attention_editor_diffusers_flux_mask",
                "regiter_attention_editor_diffusers_sd3_mask",
                "regiter_attention_editor_diffusers_sd3_mask_real",
            ),
            _MASKS,
        ),
        "regiter_attention_editor_diffusers_cog_mask": (
            "masks of a word are of one picture; a picture that holds for every frame comes with "
            "`fpe_pipeline.editing(pipe, ConsistEdit(alpha, mask=picture))`, put around calls"
        ),
    },
)


@dataclass(frozen=True)
class _UntilStep(ConsistEdit):
    """The edit in the steps that :class:`GlobalVars` says, which may change from call to call."""

    def _in_window(self, step: Step, count: int) -> bool:
        return count * step.place(self.compat) < GlobalVars.TEST_QK_STEP

    def active(self, step: Step) -> bool:
        return self._in_window(step, 1)

    def windows(self) -> Windows:
        steps = GlobalVars.TEST_QK_STEP
        return ((f"GlobalVars.TEST_QK_STEP={steps}", self.active),) if steps > 0 else ()

    def phase(self, step: Step) -> Hashable:
        return tuple(self._in_window(step, count) for count in (1, 2))

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Products:
        return super().products(site, step, roles) if has_targets(roles) else {}


class _PairSession(EditingSession):
    """A session whose batches of two and four rows are the original's, and in which no other is edited."""

    def _read_roles(self, call: ModelCall) -> BatchRoles:
        rows = call.rows
        sources = {2: (0, 0), 4: (0, 0, 2, 2)}.get(rows, tuple(range(rows)))
        return BatchRoles(tuple(row >= rows - 2 for row in range(rows)), sources)


class _QuarterSession(EditingSession):
    """A session whose batches are the original's quarters: sources and targets, of either half."""

    def _read_roles(self, call: ModelCall) -> BatchRoles:
        quarter, rest = divmod(call.rows, 4)
        if rest:
            raise ValueError(
                f"the original takes a guided batch of sources and as many targets, got {call.rows} rows: leave "
                'compat="original" out to edit any number of targets of one source, guided or not'
            )
        sources = tuple(row - quarter * (row // quarter % 2) for row in range(call.rows))
        return BatchRoles(tuple(row >= 2 * quarter for row in range(call.rows)), sources)


def regiter_attention_editor_diffusers_sd3(model: Any, *, compat: str | None = None) -> RegisteredEdit:
    """Before step ``GlobalVars.TEST_QK_STEP``, targets' image queries and keys are the source's, in both halves.

    Args:
        model: a pipeline of Stable Diffusion 3.
        compat: "original" takes two rows for a source and its target, whatever they are, four for both halves of the
            two, and edits nothing in a batch of another number.

    Returns:
        What restores the transformer: ``.restore()``, or a ``with`` block.

    Raises:
        TypeError: another pipeline.
    """
    return _registered(model, "sd3", "Stable Diffusion 3", chosen_compat(compat))


def regiter_attention_editor_diffusers_flux(model: Any, *, compat: str | None = None) -> RegisteredEdit:
    """In the single blocks, in the steps before ``GlobalVars.TEST_QK_STEP``, image queries and keys are the source's.

    Args:
        model: a pipeline of FLUX.1.
        compat: "original" counts every step twice, so that half as many are edited, and takes a batch for two halves.

    Returns:
        What restores the transformer: ``.restore()``, or a ``with`` block.

    Raises:
        TypeError: another pipeline.
    """
    return _registered(model, "flux", "FLUX.1", chosen_compat(compat))


def regiter_attention_editor_diffusers_cog(model: Any, *, compat: str | None = None) -> RegisteredEdit:
    """In the steps before ``GlobalVars.TEST_QK_STEP``, queries and keys of all frames are the source's, in both halves.

    Args:
        model: a pipeline of CogVideoX.
        compat: "original" edits every step, whatever ``TEST_QK_STEP`` says, and takes a guided batch of sources and as
            many targets.

    Returns:
        What restores the transformer: ``.restore()``, or a ``with`` block.

    Raises:
        TypeError: another pipeline.
    """
    return _registered(model, "cogvideox", "CogVideoX", chosen_compat(compat))


def _registered(model: Any, family: str, name: str, compat: Literal["original"] | None) -> RegisteredEdit:
    adapter = adapter_of(model)
    if adapter.family != family:
        raise TypeError(f"expected a pipeline of {name}, got one with {type(adapter.module).__name__}")
    original = {"sd3": _PairSession, "flux": HalvesSession, "cogvideox": _QuarterSession}[family]
    every_step = family == "cogvideox" and compat == "original"
    edit = ConsistEdit(1.0) if every_step else _UntilStep(compat=compat)
    session = (original if compat == "original" else EditingSession)(model, edit)
    registered = RegisteredEdit(session)
    dual = sum(site.place == "dual" for site in adapter.sites) if family == "flux" else 0
    GlobalVars.NUM_ATT_LAYERS, GlobalVars.NUM_ATT_2_LAYERS = len(adapter.sites) - dual, dual
    return registered
