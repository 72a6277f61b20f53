"""What a session did: which layers were replaced at which steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .schedule import Step

__all__ = ["EditReport"]


@dataclass
class EditReport:
    """Replaced layers by step, for the latest run.

    Args:
        total: steps of the run; 0 before the first UNet call.
        layers: for each replaced layer's path, the steps at which it was replaced, in order.
    """

    total: int = 0
    layers: dict[str, list[int]] = field(default_factory=dict)
    _latest: int = field(default=-1, init=False, repr=False)

    def add(self, step: Step, paths: Iterable[str]) -> None:
        if step.index < self._latest or step.total != self.total:  # a new run
            self.total = step.total
            self.layers = {}
        self._latest = step.index
        for path in paths:
            steps = self.layers.setdefault(path, [])
            if not steps or steps[-1] != step.index:
                steps.append(step.index)

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers replaced in a run of {self.total} steps"]
        lines += [f"  {path}: steps {_ranges(steps)}" for path, steps in self.layers.items()]
        return "\n".join(lines)


def _ranges(steps: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
