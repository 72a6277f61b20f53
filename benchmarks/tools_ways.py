"""One tool at one size: the ways of making its step, when ours is right, and the rows of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .rows import Environment, Row
from .table_parts import DENSE, UNEDITED
from .tools_cases import TOOLS, Step, case_name

__all__ = ["BUDGET", "MOST", "OURS", "Tool"]

OURS = "fpe"
#: Largest difference of two outputs, as a share of what the tool changes, or of the largest value where it only looks.
BUDGET = 1e-2
#: Most bytes of maps that the original's way may hold here.
MOST = 12 * 2**30


@dataclass(frozen=True)
class _Way:
    """One way of making a step: what is entered around it, and the step."""

    around: Callable[[], AbstractContextManager[Any]]
    step: Callable[[], torch.Tensor]

    def __call__(self) -> torch.Tensor:
        with self.around():
            return self.step()


class Tool:
    """One tool at one size: the ways of making its step, and its rows.

    Args:
        name: a key of `TOOLS`.
        side: of the latents.
        device: "cpu" or "cuda".
    """

    def __init__(self, name: str, side: int, device: str = "cpu") -> None:
        self.case: Step = TOOLS[name](side, device)
        self._environment = Environment.read(device)
        self._about = {"suite": "tools", "case": case_name(name, side), "dtype": "float32"}
        self.ways: dict[str, Callable[[], torch.Tensor]] = {OURS: _Way(self.case.ours, self.case.step)}
        if self.case.dense_bytes <= MOST:
            self.ways[DENSE] = _Way(self.case.dense, self.case.step)
        self.ways[UNEDITED] = self.case.plain or _Way(nullcontext, self.case.step)

    def missing(self) -> list[Row]:
        """The row of the original's way where its maps are too large."""
        if DENSE in self.ways:
            return []
        reason = f"its maps are {self.case.dense_bytes / 2**30:.0f} GiB, more than the {MOST / 2**30:.0f} of these rows"
        return [self._row(DENSE, status="missing", reason=reason)]

    def error(self, outputs: Mapping[str, torch.Tensor]) -> float:
        """How far ours is from the original's; 0 where there is none to compare with."""
        if DENSE not in outputs:
            return 0.0
        exact = outputs[DENSE].double()
        largest = change = exact.abs().max()
        if self.case.plain is None:  # another step gives something else
            change = (exact - outputs[UNEDITED]).abs().max()
        return float((outputs[OURS] - exact).abs().max() / (largest if change < 1e-6 * largest else change))

    def wrong(self, error: float) -> list[Row]:
        """The row of a result that is too far off."""
        return [] if error <= BUDGET else [self._row(OURS, status="wrong", error=error, budget=BUDGET)]

    def measured(self, samples: Mapping[str, Sequence[float]], peaks: Mapping[str, int], error: float) -> list[Row]:
        """The rows of what was measured, by way."""
        rows = []
        for name in samples:
            gate = {"error": error, "budget": BUDGET} if name == OURS and DENSE in samples else {}
            rows.append(self._row(name, status="ok", samples_ms=samples[name], peak_mb=peaks[name] / 1e6, **gate))
        return rows

    def _row(self, provider: str, **values: Any) -> Row:
        return Row.new(self._environment, **self._about, provider=provider, **values)
