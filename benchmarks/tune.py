"""`python -m benchmarks.tune`: which launch configuration is fastest, measured.

Every candidate of a shape is compiled (in parallel processes, into Triton's cache on disk), held against
float64, and timed in the same rounds as the committed configuration and the fastest that PyTorch has. A
candidate takes effect through `fpe_kernels.backends.triton.configs.apply_config`, which is all that this file
knows of the kernels. The result is a table to commit, not a choice made at run time.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .inputs import Inputs
from .measure import Effort
from .providers import Call, Ours, Provider, all_providers
from .rows import Row, write
from .run import Bench

log = logging.getLogger("benchmarks")

EFFORT = Effort(rounds=5, seconds=3.0, sample_ms=5.0, calls_a_sample=8)
RIVALS = ("sdpa-flash", "sdpa-cudnn", "sdpa-flash-concat", "sdpa-cudnn-concat")
REGISTERS = 65536  # of a multiprocessor since Kepler


@dataclass(frozen=True, order=True)
class Candidate:
    block_m: int
    block_n: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}w{self.warps}s{self.stages}"

    def fits(self, head_dim: int, columns: int, shared_bytes: int, itemsize: int = 2) -> bool:
        """Whether the tiles can be held at all; what compiles but spills shows in its time.

        Shared memory holds the query tile and `stages` key and value tiles; registers hold the accumulator,
        the scores and their half-precision copy.
        """
        shared = (self.block_m * head_dim + self.stages * self.block_n * (head_dim + columns)) * itemsize
        registers = self.block_m * (columns + 1.5 * self.block_n)
        a_thread = registers / (32 * self.warps)
        return shared <= shared_bytes and registers <= 0.9 * REGISTERS and a_thread <= 224


ALL = [Candidate(*c) for c in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))]


def candidates(case: Case, shared_bytes: int = 227 << 10) -> list[Candidate]:
    columns = case.head_dim * (case.batch // case.maps)
    return [candidate for candidate in ALL if candidate.fits(case.head_dim, columns, shared_bytes)]


def tuning_plan() -> list[Case]:
    """The shapes that decide, the most telling first: two branches, one, then more; medium, short, long."""
    shapes = [(10, 64), (8, 40), (8, 80), (8, 160)]
    cases = [Case("tune", 512, 4096, heads, d, 1, "halves") for heads, d in shapes]
    cases += [Case("tune", 256, 1024, heads, d, 1, "halves") for heads, d in [(20, 64), *shapes[1:]]]
    cases += [Case("tune", 512, 4096, heads, d, 0, "halves") for heads, d in shapes]
    cases += [Case("tune", 512, 4096, heads, d, 3, "pair") for heads, d in shapes]
    return cases + [Case("tune", 1024, 16384, heads, d, 1, "halves") for heads, d in shapes]


@contextmanager
def installed(candidate: Candidate) -> Iterator[None]:
    """Every forward launch inside the block takes this configuration."""
    from fpe_kernels.backends.triton import configs

    before = configs.apply_config
    chosen = configs.Config(candidate.block_m, candidate.block_n, candidate.warps, candidate.stages)
    configs.apply_config = lambda *arguments, **keywords: chosen
    try:
        yield
    finally:
        configs.apply_config = before


@dataclass(frozen=True)
class Configured:
    """Ours with one candidate."""

    candidate: Candidate
    backend: str = "triton"

    @property
    def name(self) -> str:
        return f"fpe-{self.backend}@{self.candidate}"

    def prepare(self, inputs: Inputs) -> Call:
        call = Ours(self.backend).prepare(inputs)

        def configured() -> Any:
            with installed(self.candidate):
                return call()

        return configured


def compile_one(case: Case, candidate: Candidate) -> str | None:
    """Launch a candidate once, which leaves its binary in the cache on disk; None, or what went wrong."""
    try:
        inputs = Inputs.make(case, "cuda", torch.float16)
        Configured(candidate).prepare(inputs)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def run_tuning(
    bench: Bench,
    cases: Sequence[Case],
    report: Callable[[list[Row]], None] = lambda rows: None,
    time_left: Callable[[], float] = lambda: float("inf"),
    choose: Callable[[Case], Sequence[Candidate]] = candidates,
) -> list[Row]:
    """Rows of suite `tuning`, a provider a candidate; stops where no time is left."""
    named = all_providers()
    rows: list[Row] = []
    cuda = bench.device.startswith("cuda")
    backend = "triton" if cuda else "torch"
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        # All shapes are compiled ahead, in order; a shape is timed as soon as its own candidates are there.
        pending = {}
        if cuda:
            pending = {(case, c): pool.submit(compile_one, case, c) for case in cases for c in choose(case)}
        for number, case in enumerate(cases):
            if time_left() <= 0:
                log.warning("no time left: %d of %d shapes tuned", number, len(cases))
                break
            chosen = []
            for candidate in choose(case):
                problem = pending[case, candidate].result() if cuda else None
                if problem:
                    log.warning("%s, %s: %s", case.name, candidate, problem)
                else:
                    chosen.append(candidate)
            others = [named[f"fpe-{backend}"], *(named[name] for name in RIVALS if cuda)]
            providers: list[Provider] = [*others, *(Configured(candidate, backend) for candidate in chosen)]
            measured = [_as_tuning(row) for row in bench.case(case, providers)]
            report(measured)
            rows += measured
        for future in pending.values():
            future.cancel()
    return rows


def _as_tuning(row: Row) -> Row:
    from dataclasses import replace

    return replace(row, suite="tuning")


def best_table(rows: Sequence[Row]) -> str:
    """A line a shape: the fastest candidates, the committed configuration and the fastest rival, in ms."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows if row.case != "any"):
        timed = sorted((r for r in rows if r.case == case and r.median_ms), key=lambda r: r.median_ms or 0.0)
        ours = [row for row in timed if "@" in row.provider][:3]
        others = [row for row in timed if "@" not in row.provider]
        words = [f"{row.provider.split('@')[1]} {row.median_ms:.3f}" for row in ours]
        words += [f"{row.provider} {row.median_ms:.3f}" for row in others[:2]]
        lines.append(f"  {case}: " + ", ".join(words))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write rows to")
    parser.add_argument("--cases", default="", help="only shapes whose name contains this")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA device; `make gpu` runs it together with everything else that does")
    bench = Bench("cuda", torch.float16, EFFORT)
    cases = [case for case in tuning_plan() if options.cases in case.name]
    rows = run_tuning(bench, cases, lambda measured: print(best_table(measured), flush=True))
    if options.json:
        write(options.json, rows)


if __name__ == "__main__":
    main()
