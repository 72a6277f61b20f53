"""`python -m benchmarks.tune`: which launch configuration is fastest, measured.

Every choice of a shape is compiled (in parallel processes that launch nothing and may abort, into Triton's cache on
disk) and tried; the promising ones are held against float64 and timed in the same rounds as the committed configuration
and the fastest that PyTorch has. Where all
maps have equally many rows, the choices are tile sizes, warps, stages and tensor descriptors; in a guided batch, whose
unconditional rows have maps of their own, they are one launch or two. A choice takes effect through
`fpe_kernels.backends.triton.configs`.

The result is a table to commit, not a choice made at run time: `python -m benchmarks.tune --apply ROWS` writes it.
"""

from __future__ import annotations

import argparse
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .candidates import (
    Choice,
    choices,
    tuning_plan,
)
from .cases import Case
from .inputs import Inputs
from .measure import Clock, Effort
from .providers import Call, Ours, Provider
from .rivals import all_providers
from .rows import Row, read, write
from .run import Bench, first_line

log = logging.getLogger("benchmarks")

EFFORT = Effort(rounds=5, seconds=3.0, sample_ms=5.0, calls_a_sample=8)
RIVALS = ("sdpa-flash", "sdpa-cudnn", "sdpa-flash-concat", "sdpa-cudnn-concat")
FINALISTS, SCREENING_CALLS = 6, 4  # how many choices are timed properly, and the calls that say which


@dataclass(frozen=True)
class Configured:
    """Ours with one choice."""

    choice: Choice
    backend: str = "triton"

    @property
    def name(self) -> str:
        return f"fpe-{self.backend}@{self.choice}"

    def prepare(self, inputs: Inputs) -> Call:
        call = Ours(self.backend).prepare(inputs)

        def configured() -> Any:
            with self.choice.installed():
                return call()

        return configured


def run_tuning(
    bench: Bench,
    cases: Sequence[Case],
    report: Callable[[list[Row]], None] = lambda rows: None,
    time_left: Callable[[], float] = lambda: float("inf"),
    choose: Callable[[Case], Sequence[Choice]] | None = None,
) -> list[Row]:
    """Rows of suite `tuning`, a provider a choice; stops where no time is left.

    A few calls of every choice say which are promising; those, the committed configuration and the rivals are then held
    against float64 and timed in the same rounds.

    `choose` says what is measured for a case; left out, :func:`choices` for the device's architecture.
    """
    named = all_providers()
    rows: list[Row] = []
    cuda = bench.device.startswith("cuda")
    backend = "triton" if cuda else "torch"
    offered = {case: list((choose or _choices_on(bench.device))(case)) for case in cases}
    with _CompiledAhead(offered if cuda else {}, bench.device, time_left) as compiled:
        for number, case in enumerate(cases):
            if time_left() <= 0:
                log.warning("no time left: %d of %d shapes tuned", number, len(cases))
                break
            chosen = []
            for choice in offered[case]:
                problem = compiled.problem(case, choice)
                if problem:
                    log.warning("%s, %s: %s", case.name, choice, problem)
                else:
                    chosen.append(Configured(choice, backend))
            others = [named[f"fpe-{backend}"], *(named[name] for name in RIVALS if cuda)]
            providers: list[Provider] = [*others, *_promising(bench, case, chosen)]
            measured = [replace(row, suite="tuning") for row in bench.case(case, providers, memory=False)]
            report(measured)
            rows += measured
    return rows


def _promising(bench: Bench, case: Case, chosen: Sequence[Configured]) -> list[Configured]:
    """The :data:`FINALISTS` fastest by a few calls each, wrong ones among them; those that raise are left out."""
    if len(chosen) <= FINALISTS:
        return list(chosen)
    inputs = Inputs.make(case, bench.device, bench.dtype)
    clock = Clock(bench.device)
    times: dict[Configured, float] = {}
    for provider in chosen:
        try:
            call = provider.prepare(inputs)
            call()
            times[provider] = min(clock.calls(call, SCREENING_CALLS))
        except Exception as error:
            log.warning("%s, %s: %s", case.name, provider.choice, first_line(error))
    return sorted(times, key=lambda provider: times[provider])[:FINALISTS]


class _CompiledAhead:
    """Every choice's programs, compiled in order by processes that may abort, while earlier cases are timed."""

    def __init__(self, offered: dict[Case, list[Choice]], device: str, time_left: Callable[[], float]) -> None:
        self._offered, self._device, self._time_left = offered, device, time_left
        self._problems: dict[tuple[Case, Choice], str] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._compile, daemon=True)
        self._closed = False

    def __enter__(self) -> _CompiledAhead:
        if self._offered:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed = True

    def problem(self, case: Case, choice: Choice) -> str:
        """What was wrong with a choice, once that is known; "" for nothing."""
        if case not in self._offered:
            return ""
        with self._changed:
            place = case, choice.program
            self._changed.wait_for(lambda: place in self._problems or not self._thread.is_alive())
        return self._problems.get(place, "it was not compiled")

    def _compile(self) -> None:
        from fpe_kernels.backends.triton.chips import architecture

        from .workers.pool import Task, share_out
        from .workers.programs import COMPILE_LIMIT, worker_count

        arch = architecture(torch.device(self._device))
        every = ((case, choice.program) for case, listed in self._offered.items() for choice in listed)
        subjects = list(dict.fromkeys(every))
        tasks = [Task(f"{c.name}@{x}", "benchmarks.workers.programs:compile_choice", (c, x, arch)) for c, x in subjects]
        place = {task.name: subject for task, subject in zip(tasks, subjects, strict=True)}
        left = lambda: 0.0 if self._closed else self._time_left()  # noqa: E731
        for outcome in share_out(tasks, worker_count(), COMPILE_LIMIT, time_left=left):
            with self._changed:
                missed = "no time was left to compile it" if outcome.skipped else ""
                self._problems[place[outcome.task.name]] = outcome.problem or missed
                self._changed.notify_all()


def _choices_on(device: str) -> Callable[[Case], Sequence[Choice]]:
    from fpe_kernels.backends.triton.chips import architecture

    arch = architecture(torch.device(device))
    return lambda case: choices(case, arch)


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
    parser.add_argument("--apply", type=Path, metavar="ROWS", help="measure nothing: take over what these rows found")
    parser.add_argument("--arch", help="of the rows to apply, such as sm_90; default: by the name of their device")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.apply:
        from .tuned_table import take_over

        try:
            print(take_over(read(options.apply), options.arch))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA device; `make gpu` runs it together with everything else that does")
    bench = Bench("cuda", torch.float16, EFFORT)
    cases = [case for case in tuning_plan() if options.cases in case.name]
    rows = run_tuning(bench, cases, lambda measured: print(best_table(measured), flush=True))
    if options.json:
        write(options.json, rows)


if __name__ == "__main__":
    main()
