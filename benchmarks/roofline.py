"""The machine's own ceilings, measured: matrix product, copy, exponential.

A case's limit is the longest of the three times its work would take at those ceilings. Data sheets promise
more than a machine under load gives; what it gives is what a kernel can be held against.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from .cases import Case
from .measure import Call, Clock
from .rows import Environment, Row

KINDS = ("matmul", "copy", "exp")


@dataclass(frozen=True)
class Ceilings:
    """Floating-point operations, bytes (read and written) and exponentials a second."""

    flops: float
    bytes: float
    exponentials: float

    def limit_ms(self, case: Case, itemsize: int) -> float:
        """The shortest time that this machine could take for the work that `case` needs."""
        return 1e3 * max(self.parts(case, itemsize).values())

    def parts(self, case: Case, itemsize: int) -> dict[str, float]:
        """Seconds at each ceiling by itself; the largest names what bounds the case."""
        return {
            "matmul": case.flops / self.flops,
            "copy": case.bytes(itemsize) / self.bytes,
            "exp": case.exponentials / self.exponentials,
        }

    @classmethod
    def of_rows(cls, rows: list[Row]) -> Ceilings:
        rate = {}
        for row in rows:
            if row.suite == "roofline" and row.flops and row.samples_ms:
                rate[row.case] = row.flops / (1e-3 * min(row.samples_ms))
        missing = [kind for kind in KINDS if kind not in rate]
        if missing:
            raise ValueError(f"no row of suite 'roofline' for {', '.join(missing)}: run `python -m benchmarks`")
        return cls(*(rate[kind] for kind in KINDS))


def measure(environment: Environment, device: str, dtype: torch.dtype) -> list[Row]:
    """One row a ceiling. `flops` counts the kind's own unit; the best sample is the ceiling."""
    clock = Clock(device, cold=False)
    rows = []
    for kind, (call, amount, repeats) in _workloads(device, dtype).items():
        clock.calls(call, 2)
        samples = [statistics.median(clock.calls(call, repeats)) for _ in range(5)]
        rows.append(
            Row.new(
                environment,
                suite="roofline",
                case=kind,
                provider="machine",
                dtype=str(dtype).removeprefix("torch."),
                status="ok",
                samples_ms=tuple(samples),
                flops=amount,
            )
        )
    return rows


def _workloads(device: str, dtype: torch.dtype) -> dict[str, tuple[Call, int, int]]:
    """Kind to (call, units of work in one call, calls a sample)."""
    cuda = device.startswith("cuda")
    side = 8192 if cuda else 1024
    left, right, product = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    source = torch.randn((2**30 if cuda else 2**28) // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    exponential, exponentials = _exponential(device)
    return {
        "matmul": (lambda: torch.mm(left, right, out=product), 2 * side**3, 5),
        "copy": (lambda: target.copy_(source), 2 * source.numel() * dtype.itemsize, 3),
        "exp": (exponential, exponentials, 5),
    }


def _exponential(device: str) -> tuple[Call, int]:
    if device.startswith("cuda"):
        from .roofline_triton import exponential

        return exponential(device)
    # Small enough for the innermost cache that a tile of scores lives in, repeated to outlast the timer.
    buffer, repeats = torch.linspace(-8, 0, 2**14), 256
    out = torch.empty_like(buffer)

    def call() -> None:
        for _ in range(repeats):
            torch.exp(buffer, out=out)

    return call, repeats * buffer.numel()
