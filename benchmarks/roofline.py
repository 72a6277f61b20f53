"""The machine's own ceilings, measured: matrix product, copy, exponential.

Data sheets promise more than a machine under load gives; what it gives is what a kernel can be held against. How a
limit follows from ceilings is in `cost.py`.
"""

from __future__ import annotations

import statistics

import torch

from .measure import Call, Clock
from .rows import Environment, Row


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
