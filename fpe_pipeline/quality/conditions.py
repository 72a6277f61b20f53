"""The ways of making an edit that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..edits import Edit, FreePromptEdit

__all__ = ["DIFFERENT_NOISE", "FREE_PROMPT", "SHARED_NOISE", "Condition", "standard_conditions", "sweep_conditions"]

DIFFERENT_NOISE, SHARED_NOISE, FREE_PROMPT = "different noise", "shared noise", "free-prompt editing"


@dataclass(frozen=True)
class Condition:
    """One way of drawing the target.

    Attributes:
        name: what tables and plots call it.
        edit: the edit that is in force, or ``None``.
        shared_noise: whether the target starts from the source's noise; an edit implies it.
    """

    name: str
    edit: Edit | None = None
    shared_noise: bool = True

    def __post_init__(self) -> None:
        if self.edit is not None and not self.shared_noise:
            raise ValueError(f"condition {self.name!r} edits, so it has to start from the source's noise")


def standard_conditions(self_replace_steps: float = 0.8) -> list[Condition]:
    """Different noise, shared noise, and Free-Prompt-Editing at its defaults."""
    return [
        Condition(DIFFERENT_NOISE, shared_noise=False),
        Condition(SHARED_NOISE),
        Condition(FREE_PROMPT, FreePromptEdit(self_replace_steps=self_replace_steps)),
    ]


def sweep_conditions(
    windows: Sequence[float] = (0.2, 0.4, 0.6, 1.0), levels: Sequence[int] = (1, 2), self_replace_steps: float = 0.8
) -> list[Condition]:
    """Free-Prompt-Editing over step windows, and over single levels of the UNet."""
    by_window = [Condition(f"steps to {w:g}", FreePromptEdit(self_replace_steps=float(w))) for w in windows]
    by_level = [
        Condition(f"level {level} only", FreePromptEdit(self_replace_steps=self_replace_steps, levels=level))
        for level in levels
    ]
    return by_window + by_level
