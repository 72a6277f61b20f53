"""`python -m benchmarks.busy`: the torch backend beside processes that keep cores busy, by the wall clock.

A thread that has lost its core is what shared work waits for. Rows of suite `busy` hold ours and PyTorch's fused
attention on queries and keys of every row's own, in pairs of calls that follow each other, alone and beside one and two
processes that do nothing but compute, with one thread and with two. `--capability avx2` has the processor leave its
wider instructions alone: the rows, whose names end in `/avx2`, stand beside the others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .inputs import Inputs, judge
from .measure import Effort, interleaved
from .providers import Ours, Provider, first_answer
from .rivals import Unedited
from .rows import ROOT, Environment, Ratio, Row, read, replaced, write

RESULTS = ROOT / "benchmarks" / "results" / "cpu-busy.json"
PAIRS = 21
LEVELS, THREADS = (0, 1, 2), (2, 1)
BUSY = "while True: pass"
# What tells PyTorch, MKL and oneDNN to compute as an older processor does; they read it when they are loaded.
CAPABILITIES = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


def cases() -> list[Case]:
    """The shapes of SD 1.5 at 512 px, and SDXL's head dim at the longest of them."""
    shapes = ((4096, 40), (4096, 64), (1024, 80), (256, 160), (64, 160))
    return [Case("busy", 8 * int(tokens**0.5), tokens, 8, head_dim, 1, "pair") for tokens, head_dim in shapes]


def capability() -> str:
    """The capability that this process was told to compute with, or "" for the processor's own.

    Raises:
        RuntimeError: if only some of the libraries were told, or PyTorch computes with another one.
    """
    for name, told in CAPABILITIES.items():
        heard = [os.environ.get(variable) == value for variable, value in told.items()]
        if all(heard) and torch.backends.cpu.get_cpu_capability().lower() == name:
            return name
        if any(heard):
            raise RuntimeError(f"{', '.join(told)} say {name} together, on a processor that can: --capability {name}")
    return ""


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes compute beside what is in the block."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(
    chosen: Sequence[Case], pairs: int = PAIRS, levels: Sequence[int] = LEVELS, threads: Sequence[int] = THREADS
):
    """Yield the rows of a case at each level and number of threads."""
    before = torch.get_num_threads()
    try:
        for case in chosen:
            inputs = Inputs.make(case, "cpu", torch.float32)
            for count in threads:
                torch.set_num_threads(count)
                for level in levels:
                    yield list(_rows(case, inputs, level, pairs))
    finally:
        torch.set_num_threads(before)


def _rows(case: Case, inputs: Inputs, level: int, pairs: int) -> Iterator[Row]:
    environment = Environment.read("cpu")
    providers: list[Provider] = [Ours("torch"), Unedited()]
    # Rows of a file differ by their names.
    name = "/".join(filter(None, (case.name, f"busy-{level}", f"{environment.threads}-threads", capability())))
    calls, verdicts = {}, {}
    for provider in providers:
        call, answer = first_answer(provider, inputs)
        calls[provider.name], verdicts[provider.name] = call, judge(inputs, answer)
    effort = Effort(rounds=pairs, least_rounds=pairs, seconds=1e9, sample_ms=3.0, calls_a_sample=5)
    with busy(level):
        samples = interleaved(calls, "cpu", effort)
    for provider_name, verdict in verdicts.items():
        about: dict[str, Any] = {"suite": "busy", "case": name, "provider": provider_name, "dtype": "float32"}
        about |= {"error": verdict.error, "budget": verdict.budget}
        if verdict.passed:
            yield Row.new(environment, **about, status="ok", samples_ms=samples[provider_name])
        else:
            yield Row.new(environment, **about, status="wrong", reason=verdict.reason)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"file for the rows (default: {RESULTS.name})")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"pairs of calls (default: {PAIRS})")
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="busy processes beside (default: 0 1 2)")
    parser.add_argument("--capability", choices=CAPABILITIES, help="compute as a processor that has no more than this")
    options = parser.parse_args(argv)
    if options.capability and options.capability != capability():
        again = [sys.executable, "-m", "benchmarks.busy", *(sys.argv[1:] if argv is None else argv)]
        environment = os.environ | CAPABILITIES[options.capability]
        return subprocess.run(again, env=environment, cwd=ROOT, check=False).returncode
    rows: list[Row] = []
    chosen = [case for case in cases() if options.cases in case.name]
    for measured in measure(chosen, options.pairs, options.levels):
        rows += measured
        ours, base = measured
        if ours.samples_ms and base.samples_ms:
            print(f"{ours.case}, {ours.threads} threads: unedited ÷ ours {Ratio.of(ours, base)}", flush=True)
        kept = read(options.json) if options.json.exists() else []
        write(options.json, replaced(kept, rows))
    return int(any(row.status != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
