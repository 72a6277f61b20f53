"""One edit of a batch, and a row that is none."""

from __future__ import annotations

from dataclasses import dataclass

from ..runs.settings import Settings

__all__ = ["BadRow", "Job", "MaskSource"]

#: A picture's path, or runs of pixels as PIE-Bench writes them: start, length, start, length …
MaskSource = str | tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """One picture to make.

    Args:
        name: of the file that it becomes; no two jobs of a batch share it.
        settings: of its run, with one target and no control.
        mask: what may change; None where nobody said.
        kind: what it is counted under.
    """

    name: str
    settings: Settings
    mask: MaskSource | None = None
    kind: str = ""

    @property
    def target(self) -> str:
        """The prompt that it is edited into."""
        return self.settings.targets[0]


@dataclass(frozen=True)
class BadRow:
    """A row that asks for nothing that could be made.

    Args:
        name: under which it is reported.
        reason: what is wrong, in one line.
    """

    name: str
    reason: str
