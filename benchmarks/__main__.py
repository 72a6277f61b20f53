"""`python -m benchmarks`: measure, print, and write rows."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from . import measure
from .editors import EDITORS
from .edits import edit_plan, run_edits
from .growth import memory_plan, run_memory
from .plan import kernel_plan
from .providers import all_providers
from .report import BAD, case_table, summary
from .rows import Row, write
from .run import Bench, run_kernels

SUITES = ("kernels", "edits", "memory")


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    arguments.add_argument("suite", nargs="?", choices=[*SUITES, "all"], default="all")
    arguments.add_argument("--quick", action="store_true", help="the headline cases and short rounds")
    arguments.add_argument("--device", default="auto", help="cpu, cuda, or auto (cuda where there is one)")
    arguments.add_argument("--dtype", help="float32, float16 or bfloat16; default: float16 on cuda, float32 on cpu")
    arguments.add_argument("--json", type=Path, help="folder to write rows to, one file a suite")
    arguments.add_argument("--cases", default="", help="only cases whose name contains this")
    arguments.add_argument("--providers", help="comma-separated names; default: those that the plan names")
    arguments.add_argument("--seconds", type=float, help="most seconds of timing a case")
    arguments.add_argument("--threads", type=int, help="threads of the CPU to use; default: what PyTorch chooses")
    arguments.add_argument("-v", "--verbose", action="store_true", help="tracebacks of providers that fail")
    return arguments


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
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
    _save(options.json, device, "roofline", everything)

    for suite in SUITES if options.suite == "all" else [options.suite]:
        rows = _run(suite, bench, options)
        _save(options.json, device, suite, rows)
        everything += rows
    print("\n" + summary(everything))
    ours = [row for row in everything if row.status in BAD and row.provider.startswith("fpe")]
    return 1 if ours else 0


def _run(suite: str, bench: Bench, options: argparse.Namespace) -> list[Row]:
    named = options.providers.split(",") if options.providers else None

    def show(rows: list[Row]) -> None:
        if rows:
            print("\n" + case_table(rows), flush=True)

    if suite == "edits":
        try:
            import diffusers  # noqa: F401
        except ImportError:
            print("\nedits: diffusers is not installed; pip install fpe-kernels[pipeline]")
            return []
        cases = [case for case in edit_plan(bench.device, quick=options.quick) if options.cases in case.name]
        return run_edits(bench, cases, [name for name in EDITORS if named is None or name in named], show)

    providers = all_providers()
    if suite == "memory":
        lengths = [case for case in memory_plan(bench.device, quick=options.quick) if options.cases in case.name]
        return run_memory(bench, providers, lengths, show)
    steps = [step for step in kernel_plan(bench.device, quick=options.quick) if options.cases in step.case.name]
    if named is not None:
        providers = {name: provider for name, provider in providers.items() if name in named}
        steps = [type(step)(step.case, "all") for step in steps]
    return run_kernels(bench, providers, steps, show)


def _save(folder: Path | None, device: str, suite: str, rows: list[Row]) -> None:
    if folder is not None and rows:
        write(folder / f"{device.split(':')[0]}-{suite}.json", rows)


if __name__ == "__main__":
    sys.exit(main())
