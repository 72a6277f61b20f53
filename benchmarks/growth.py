"""How memory grows with length: the suite `memory`.

Peaks are measured where the machine has the memory. Beyond that they follow from the measured ones: what a
method holds is a·N² + b·N, exactly, so two measurements fix it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .cases import Case, length_cases
from .inputs import Inputs
from .memory import peak_bytes
from .providers import Missing, Provider, first_answer
from .rows import Row
from .run import Bench, dense_need, first_line, free_bytes

log = logging.getLogger("benchmarks")

LENGTHS = (256, 1024, 4096, 9216, 16384)
PROVIDERS = ("fpe-triton", "fpe-torch", "sdpa", "dense-original")


def memory_plan(device: str, *, quick: bool = False) -> list[Case]:
    return length_cases(LENGTHS[:3] if quick else LENGTHS)


def run_memory(
    bench: Bench,
    providers: dict[str, Provider],
    cases: Iterable[Case],
    report: Callable[[list[Row]], None] = lambda rows: None,
    time_left: Callable[[], float] = lambda: float("inf"),
) -> list[Row]:
    """A row a case and provider, with `peak_mb` beyond the inputs and no time."""
    rows: list[Row] = []
    for case in cases:
        if time_left() <= 0:
            log.warning("no time left: memory is not measured from %d tokens on", case.tokens)
            break
        inputs = Inputs.make(case, bench.device, bench.dtype)
        measured = [_row(bench, case, inputs, providers[name]) for name in PROVIDERS if name in providers]
        report(measured)
        rows += measured
    return rows


def _row(bench: Bench, case: Case, inputs: Inputs, provider: Provider) -> Row:
    about = {"suite": "memory", "case": case.name, "provider": provider.name}
    needed = dense_need(provider, case, bench.dtype.itemsize)
    if needed > min(free_bytes(bench.device), 2**62):
        reason = f"needs about {needed / 2**30:.0f} GiB, more than is free"
        return bench.row(**about, status="missing", reason=reason)
    try:
        call, _ = first_answer(provider, inputs)
        return bench.row(**about, status="ok", peak_mb=peak_bytes(call, bench.device) / 1e6)
    except Missing as reason:
        return bench.row(**about, status="missing", reason=str(reason))
    except Exception as error:
        return bench.row(**about, status="failed", reason=first_line(error))


@dataclass(frozen=True)
class Growth:
    """Bytes held at N tokens: `square`·N² + `linear`·N."""

    square: float
    linear: float

    @classmethod
    def fit(cls, points: Sequence[tuple[int, float]]) -> Growth:
        """Through the two longest of the points (tokens, bytes)."""
        if len(points) < 2:
            raise ValueError(f"a growth law needs two lengths, got {len(points)}")
        (n, a), (m, b) = sorted(points)[-2:]
        square = (b / m - a / n) / (m - n)
        # A share of N² that would not show at the longest length is the noise of fixed costs.
        square = square if square * m**2 > 0.01 * b else 0.0
        return cls(square, b / m - square * m)

    def bytes(self, tokens: float) -> float:
        return self.square * tokens**2 + self.linear * tokens

    def longest(self, limit: float) -> int:
        """Most tokens whose bytes stay within `limit`."""
        if self.square == 0:
            return int(limit / self.linear)
        half = self.linear / (2 * self.square)
        return int((half**2 + limit / self.square) ** 0.5 - half)


def input_bytes(case: Case, itemsize: int) -> int:
    """What the caller holds: queries and keys of the maps, values of the rows."""
    return (2 * case.maps + case.batch) * case.heads * case.tokens * case.head_dim * itemsize
