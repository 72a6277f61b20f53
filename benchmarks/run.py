"""Measures cases and makes rows of them: correctness first, then memory, then time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from . import roofline
from .cases import Case
from .cost import Ceilings
from .inputs import Inputs, judge
from .measure import Call, Effort, interleaved
from .memory import peak_bytes
from .plan import Step
from .providers import Missing, Provider, first_answer
from .rows import Environment, Row

log = logging.getLogger("benchmarks")


class Bench:
    """One run on one device: its environment, its ceilings, and who has turned out not to be here."""

    def __init__(self, device: str, dtype: torch.dtype, effort: Effort, environment: Environment | None = None) -> None:
        self.device, self.dtype, self.effort = device, dtype, effort
        self.environment = environment or Environment.read(device)
        self.ceilings: Ceilings | None = None
        self._absent: set[str] = set()

    def row(self, **values: Any) -> Row:
        return Row.new(self.environment, dtype=str(self.dtype).removeprefix("torch."), **values)

    def roofline(self) -> list[Row]:
        rows = roofline.measure(self.environment, self.device, self.dtype)
        self.ceilings = Ceilings.of_rows(rows)
        return rows

    def case(self, case: Case, providers: Iterable[Provider], *, memory: bool = True) -> list[Row]:
        """Rows of one case, its providers timed in the same rounds; with peaks of `memory`, which take a while."""
        inputs = Inputs.make(case, self.device, self.dtype)
        limit = self.ceilings.limit_ms(case, self.dtype.itemsize) if self.ceilings else None
        shared = {"suite": "kernels", "case": case.name, "flops": case.flops, "limit_ms": limit}
        rows: list[Row] = []
        ready: dict[str, tuple[Call, dict[str, Any]]] = {}
        for provider in providers:
            if provider.name in self._absent:
                continue
            try:
                needed = dense_need(provider, case, self.dtype.itemsize)
                if needed > free_bytes(self.device):
                    raise Missing(f"needs about {needed / 2**30:.0f} GiB, more than is free")
                call, answer = first_answer(provider, inputs)
                verdict = judge(inputs, answer)
                del answer
            except Missing as reason:
                values = {**shared, "provider": provider.name, "status": "missing", "reason": str(reason)}
                if reason.everywhere:
                    self._absent.add(provider.name)
                    values |= {"case": "any", "flops": None, "limit_ms": None}
                rows.append(self.row(**values))
                continue
            except Exception as error:
                log.debug("%s failed in %s", provider.name, case.name, exc_info=True)
                rows.append(self.row(**shared, provider=provider.name, status="failed", reason=first_line(error)))
                continue
            measured = {"provider": provider.name, "error": verdict.error, "budget": verdict.budget}
            if not verdict.passed:
                rows.append(self.row(**shared, **measured, status="wrong", reason=verdict.reason))
                continue
            if memory:
                measured["peak_mb"] = peak_bytes(call, self.device) / 1e6
            ready[provider.name] = call, measured
        samples = interleaved({name: call for name, (call, _) in ready.items()}, self.device, self.effort)
        rows += [
            self.row(**shared, **measured, status="ok", samples_ms=samples[name])
            for name, (_, measured) in ready.items()
        ]
        return rows


def dense_need(provider: Provider, case: Case, itemsize: int) -> int:
    """Bytes that a provider which materialises maps holds at its peak: the scores, their softmax, a copy."""
    dense = provider.name in ("dense-original", "fpe-reference") or "math" in provider.name
    return 3 * case.dense_bytes(itemsize) if dense else 0


def free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**63
    available = next(line for line in lines if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024


def first_line(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0]}"


def run_kernels(
    bench: Bench,
    providers: dict[str, Provider],
    plan: Iterable[Step],
    report: Callable[[list[Row]], None] = lambda rows: None,
    time_left: Callable[[], float] = lambda: float("inf"),
) -> list[Row]:
    """All rows of a plan; stops where no time is left, and says at which case."""
    rows: list[Row] = []
    plan = list(plan)
    for number, step in enumerate(plan):
        if time_left() <= 0:
            log.warning("no time left: %d of %d cases measured", number, len(plan))
            break
        measured = bench.case(step.case, [providers[name] for name in step.choose(providers)])
        rows += measured
        report(measured)
    return rows
