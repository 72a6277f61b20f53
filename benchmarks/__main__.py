"""`python -m benchmarks`: measure, print, and write rows."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import measure
from .batches import batches_plan, run_batches
from .editors import EDITORS
from .edits import edit_plan, run_edits
from .growth import memory_plan, run_memory
from .plan import kernel_plan
from .recordings import recordings_plan, run_recordings
from .report import BAD, case_table, summary
from .rivals import all_providers
from .rows import Row, read, replaced, write
from .run import Bench, run_kernels

SUITES = ("kernels", "edits", "recordings", "batches", "memory")
NEED_DIFFUSERS = ("edits", "recordings", "batches")


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    arguments.add_argument("suite", nargs="?", choices=[*SUITES, "all"], default="all")
    arguments.add_argument("--quick", action="store_true", help="the headline cases and short rounds")
    arguments.add_argument("--device", default="auto", help="cpu, cuda, or auto (cuda where there is one)")
    arguments.add_argument("--dtype", help="float32, float16 or bfloat16; default: float16 on cuda, float32 on cpu")
    arguments.add_argument(
        "--json",
        type=Path,
        help="folder to write rows to, one file a suite, after every case; rows of other cases stay in the file",
    )
    arguments.add_argument(
        "--resume", action="store_true", help="leave out cases that --json has rows of this commit of"
    )
    arguments.add_argument("--cases", default="", help="only cases whose name contains this")
    arguments.add_argument("--providers", help="comma-separated names; default: those that the plan names")
    arguments.add_argument("--seconds", type=float, help="most seconds of timing a case")
    arguments.add_argument("--threads", type=int, help="threads of the CPU to use; default: what PyTorch chooses")
    arguments.add_argument("-v", "--verbose", action="store_true", help="tracebacks of providers that fail")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parser()
    options = arguments.parse_args(argv)
    if options.resume and options.json is None:
        arguments.error("--resume needs --json, the folder with the rows of the run to go on with")
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.WARNING, format="%(message)s")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype or ("float16" if device.startswith("cuda") else "float32"))
    effort = measure.QUICK if options.quick else measure.THOROUGH
    known = [*all_providers(), *EDITORS]
    unknown = set(options.providers.split(",") if options.providers else ()) - set(known)
    if unknown:
        raise SystemExit(f"no provider {', '.join(sorted(unknown))}; there are {', '.join(dict.fromkeys(known))}")
    if options.seconds:
        effort = measure.Effort(effort.rounds, effort.least_rounds, options.seconds, effort.sample_ms)

    bench = Bench(device, dtype, effort)
    print(f"{bench.environment.device}, {bench.environment.threads} threads, commit {bench.environment.commit}")
    print(", ".join(f"{name} {version}" for name, version in bench.environment.versions.items()))
    everything = bench.roofline()
    Results(bench, options, "roofline").keep(everything)
    for suite in SUITES if options.suite == "all" else [options.suite]:
        results = Results(bench, options, suite)
        _run(suite, bench, options, results)
        everything += results.measured
    print("\n" + summary(everything))
    ours = [row for row in everything if row.status in BAD and row.provider.startswith("fpe")]
    return 1 if ours else 0


class Results:
    """The rows of one suite: kept, written where asked for, and known when a run goes on."""

    def __init__(self, bench: Bench, options: argparse.Namespace, suite: str) -> None:
        folder: Path | None = options.json
        self.path = None if folder is None else folder / f"{bench.device.split(':')[0]}-{suite}.json"
        self.measured: list[Row] = []
        self.before = read(self.path) if self.path is not None and self.path.exists() else []
        like = bench.row(suite=suite, case="", provider="", status="ok")
        done = {row.case for row in self.before if row.key[3:] == like.key[3:]} if options.resume else set()
        self.wanted: Callable[[str], bool] = lambda case: options.cases in case and case not in done

    def keep(self, rows: list[Row]) -> None:
        self.measured += rows
        if self.path is not None and rows:
            write(self.path, replaced(self.before, self.measured))

    def show(self, rows: list[Row]) -> None:
        """Keep the rows of a case and print its table."""
        self.keep(rows)
        if rows:
            print("\n" + case_table(rows), flush=True)


def _run(suite: str, bench: Bench, options: argparse.Namespace, results: Results) -> None:
    named = options.providers.split(",") if options.providers else None
    if suite in NEED_DIFFUSERS and importlib.util.find_spec("diffusers") is None:
        print(f"\n{suite}: diffusers is not installed; pip install fpe-kernels[pipeline]")
        return
    if suite == "recordings":
        recorded = [case for case in recordings_plan(quick=options.quick) if results.wanted(case.name)]
        run_recordings(bench.device, bench.effort, recorded, results.show, dtype=options.dtype or "auto")
        return
    if suite == "batches":
        shared = [case for case in batches_plan(quick=options.quick) if results.wanted(case.name)]
        run_batches(bench.device, bench.effort, shared, results.show, dtype=options.dtype or "auto")
        return
    if suite == "edits":
        cases = [case for case in edit_plan(bench.device, quick=options.quick) if results.wanted(case.name)]
        run_edits(bench, cases, [name for name in EDITORS if named is None or name in named], results.show)
        return

    providers = all_providers()
    if suite == "memory":
        lengths = [case for case in memory_plan(bench.device, quick=options.quick) if results.wanted(case.name)]
        run_memory(bench, providers, lengths, results.show)
        return
    steps = [step for step in kernel_plan(bench.device, quick=options.quick) if results.wanted(step.case.name)]
    if named is not None:
        providers = {name: provider for name, provider in providers.items() if name in named}
        steps = [type(step)(step.case, "all") for step in steps]
    run_kernels(bench, providers, steps, results.show)


if __name__ == "__main__":
    sys.exit(main())
