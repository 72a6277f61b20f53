"""The ways of making an edit that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...edits import CombinedEdit, ConsistEdit, Edit, FreePromptEdit, StableFlowEdit
from ...edits.base import Products, Windows
from ...edits.products import Product
from ...edits.registry import METHODS, make_edit
from ...edits.selection import LayerSelection
from ...models.roles import BatchRoles
from ...models.sites import Site
from ...models.steps import Step, StepWindow

__all__ = [
    "CROSS_ATTENTION",
    "DIFFERENT_NOISE",
    "FREE_PROMPT",
    "SHARED_NOISE",
    "Condition",
    "CrossMapEdit",
    "edit_by_condition",
    "method_conditions",
    "standard_conditions",
    "sweep_conditions",
    "transformer_conditions",
]

DIFFERENT_NOISE, SHARED_NOISE, FREE_PROMPT = "different noise", "shared noise", "free-prompt editing"
CROSS_ATTENTION = "cross-attention instead"
# The method's own limit; the embedded model has no layer above it.
_MAX_TOKENS = 32**2


@dataclass(frozen=True)
class Condition:
    """One way of drawing the target.

    Args:
        name: what tables and plots call it.
        edit: the edit that is in force, or ``None``.
        shared_noise: whether the target starts from the source's noise; an edit implies it.
        method: in place of ``edit``, a method that asks for the prompts, by its name in the registry.
        options: of the method.
    """

    name: str
    edit: Edit | None = None
    shared_noise: bool = True
    method: str | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if (self.edit is not None or self.method is not None) and not self.shared_noise:
            raise ValueError(f"condition {self.name!r} edits, so it has to start from the source's noise")
        if self.edit is not None and self.method is not None:
            raise ValueError(f"condition {self.name!r} names an edit and a method: which one?")

    def edit_for(self, prompts: Sequence[str], tokenizer: Any, source_of: Sequence[int], model: Any) -> Edit | None:
        """The edit of a batch with these prompts, each of which ``source_of`` gives its source, for a pipeline."""
        if self.method is None:
            return self.edit
        options = dict(self.options)
        if METHODS[self.method].aligns:
            options["source_of"] = source_of
        return make_edit(self.method, prompts, tokenizer, model, **options)


@dataclass(frozen=True)
class CrossMapEdit(Edit):
    """Every cross-attention map of a target is its source's: the control for the claim that self-attention maps keep
    the layout and cross-attention maps do not.

    Args:
        steps: the window's end, as a fraction of the steps.
    """

    steps: float = 0.8

    def active(self, step: Step) -> bool:
        return step in StepWindow(0.0, self.steps)

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return LayerSelection("cross").match(sites)

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product]:
        return {target: Product(source, (source,), (target,)) for source, target in roles.pairs()}


@dataclass(frozen=True)
class _EditOfOne(Edit):
    """An edit of one of a batch's prompts, whose source is edited in other ways beside it.

    Args:
        edit: what is done to it.
        place: its number in the batch, the source's being 0.
        count: prompts of the batch.
    """

    edit: Edit
    place: int
    count: int

    def active(self, step: Step) -> bool:
        return self.edit.active(step)

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return self.edit.select(sites)

    def windows(self) -> Windows:
        return self.edit.windows()

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Products:
        mine: set[int] = set()
        for half in (True, False):  # edits of joint attention take rows of both
            rows = roles.select(conditional=half)
            block = len(rows) // self.count
            mine.update(rows[self.place * block : (self.place + 1) * block])
        own = tuple(source if row in mine else row for row, source in enumerate(roles.source_of))
        return self.edit.products(site, step, BatchRoles(roles.conditional, own))


def edit_by_condition(edits: Sequence[Edit | None]) -> Edit | None:
    """Several edits of one source in one batch: its maps are computed once for all conditions.

    Args:
        edits: what is done to each prompt of the batch, the source's first; ``None`` leaves one alone.

    Returns:
        The edit; None where all are left alone.
    """
    chosen = [(place, edit) for place, edit in enumerate(edits) if edit is not None]
    return CombinedEdit([_EditOfOne(edit, place, len(edits)) for place, edit in chosen]) if chosen else None


def standard_conditions(self_replace_steps: float = 0.8) -> list[Condition]:
    """Different noise, shared noise, and Free-Prompt-Editing with its authors' limit of 32² tokens."""
    return [
        Condition(DIFFERENT_NOISE, shared_noise=False),
        Condition(SHARED_NOISE),
        Condition(FREE_PROMPT, FreePromptEdit(self_replace_steps=self_replace_steps, max_tokens=_MAX_TOKENS)),
    ]


def sweep_conditions(
    windows: Sequence[float] = (0.2, 0.4, 0.6, 1.0), levels: Sequence[int] = (0, 1), self_replace_steps: float = 0.8
) -> list[Condition]:
    """Free-Prompt-Editing over step windows and over single levels of the UNet, and cross-attention in its place."""
    by_window = [
        Condition(f"steps to {w:g}", FreePromptEdit(self_replace_steps=float(w), max_tokens=_MAX_TOKENS))
        for w in windows
    ]
    by_level = [
        Condition(f"level {level} only", FreePromptEdit(self_replace_steps=self_replace_steps, levels=level))
        for level in levels
    ]
    return [*by_window, *by_level, Condition(CROSS_ATTENTION, CrossMapEdit(self_replace_steps))]


def transformer_conditions(self_replace_steps: float = 0.2, *, methods: bool = True) -> list[Condition]:
    """What :func:`standard_conditions` are, on joint attention; and the methods of transformers with their defaults.

    Stable Flow's vital layers are known for FLUX.1 alone: on any other transformer it takes all of them here, and its
    name says so.
    """
    standard = [
        Condition(DIFFERENT_NOISE, shared_noise=False),
        Condition(SHARED_NOISE),
        Condition(FREE_PROMPT, FreePromptEdit(self_replace_steps=self_replace_steps)),
    ]
    others = [
        Condition("consistedit", ConsistEdit()),
        Condition("stable flow, all layers", StableFlowEdit(layers=("transformer_blocks",))),
    ]
    return standard + others if methods else standard


def method_conditions() -> list[Condition]:
    """The other methods, with their defaults for the model."""
    return [
        Condition("prompt-to-prompt", method="p2p-replace"),
        Condition("plug-and-play", method="pnp"),
        Condition("masactrl", method="masactrl"),
        Condition("style-aligned", method="style-aligned"),
    ]
