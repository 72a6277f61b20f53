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
import itertools
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from . import hopper_tiles
from .cases import Case
from .inputs import Inputs
from .measure import Clock, Effort
from .providers import Call, Ours, Provider, all_providers
from .rows import Row, read, write
from .run import Bench, first_line

log = logging.getLogger("benchmarks")

EFFORT = Effort(rounds=5, seconds=3.0, sample_ms=5.0, calls_a_sample=8)
RIVALS = ("sdpa-flash", "sdpa-cudnn", "sdpa-flash-concat", "sdpa-cudnn-concat")
FINALISTS, SCREENING_CALLS = 6, 4  # how many choices are timed properly, and the calls that say which
REGISTERS = 65536  # of a multiprocessor since Kepler


class Choice(Protocol):
    """Something to measure; `str` of it names the row's provider after an `@`."""

    def installed(self) -> AbstractContextManager[None]:
        """Forward launches inside the block are made so."""
        ...


@dataclass(frozen=True, order=True)
class Candidate:
    """A launch configuration."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool = False
    specialised: bool = False
    maxnreg: int = 0
    gluon: bool = False

    def __str__(self) -> str:
        fetched = "d" * self.descriptors + "s" * self.specialised + "g" * self.gluon
        bound = f"r{self.maxnreg}" if self.maxnreg else ""
        return f"{self.block_m}x{self.block_n}w{self.warps}s{self.stages}{fetched}{bound}"

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """The inverse of `str`."""
        found = re.fullmatch(r"(\d+)x(\d+)w(\d+)s(\d+)(d?)(s?)(g?)(?:r(\d+))?", text)
        if found is None:
            raise ValueError(
                f"expected a configuration such as 128x64w8s3, 128x64w4s2ds, 128x128w4s2g or 64x64w4s2r168, "
                f"got {text!r}"
            )
        block_m, block_n, warps, stages = map(int, found.groups()[:4])
        fetched = bool(found[5]), bool(found[6])
        return cls(block_m, block_n, warps, stages, *fetched, int(found[8] or 0), bool(found[7]))

    def fits(self, head_dim: int, branches: int, shared_bytes: int, itemsize: int = 2) -> bool:
        """Whether the tiles can be held at all; what compiles but spills shows in its time.

        Shared memory holds the query tile and `stages` key and value tiles; registers hold the accumulator,
        the scores and their half-precision copy. Descriptors fetch boxes, whose edges are powers of two.
        """
        if self.gluon:
            from fpe_kernels.backends.triton import hopper
            from fpe_kernels.backends.triton.configs import Config

            return hopper.most_branches(head_dim, head_dim, Config(*astuple(self))) > 0
        columns = branches * head_dim
        shared = (self.block_m * head_dim + self.stages * self.block_n * (head_dim + columns)) * itemsize
        registers = self.block_m * (columns + 1.5 * self.block_n)
        a_thread = registers / (32 * self.warps)
        boxes = head_dim.bit_count() == 1 and branches <= 4
        # Beside what is counted here a thread holds addresses, statistics and operands.
        most = self.maxnreg - 48 if self.maxnreg else 224
        held = shared <= shared_bytes and registers <= 0.9 * REGISTERS and a_thread <= most
        return held and (boxes or not self.descriptors)

    def installed(self) -> AbstractContextManager[None]:
        from fpe_kernels.backends.triton.configs import Config

        return _replaced("apply_config", Config(*astuple(self)))


@dataclass(frozen=True)
class Launches:
    """A mixed batch as one launch or as one for each number of rows, with the committed configurations."""

    together: bool

    def __str__(self) -> str:
        return "one-launch" if self.together else "two-launches"

    def installed(self) -> AbstractContextManager[None]:
        return _replaced("one_launch", self.together)


@cache
def _answering(answer: Any) -> Callable[..., Any]:
    # One function for an answer: what was worked out by it once is kept.
    return lambda *arguments, **keywords: answer


@contextmanager
def _replaced(name: str, answer: Any) -> Iterator[None]:
    """The function `name` of the configurations answers this inside the block, whatever it is asked."""
    from fpe_kernels.backends.triton import configs

    before = getattr(configs, name)
    setattr(configs, name, _answering(answer))
    try:
        yield
    finally:
        setattr(configs, name, before)


ALL = [Candidate(*c) for c in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))]
DESCRIBED = [Candidate(*c, descriptors=True) for c in itertools.product((64, 128), (64, 128), (4, 8), (2, 3))]
# Four warps that compute are what the compiler adds fetching warps to; where it refuses, there is no such candidate.
SPECIALISED = [Candidate(*c, 4, stages, True, True) for c in ((64, 64), (64, 128), (128, 64)) for stages in (2, 3)]
# Registers at which three or four programs of four warps share a multiprocessor.
BOUNDED = [Candidate(*c, maxnreg=most) for c in itertools.product((64,), (32, 64), (4,), (2, 3)) for most in (128, 168)]

# What a first run on Hopper left of the pointer kernel's candidates: no other was among the fastest there.
PLAUSIBLE = [
    Candidate(*c)
    for c in (
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 128, 8, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (128, 32, 8, 3),
    )
]


def choices(case: Case, arch: str = "sm_90") -> Sequence[Choice]:
    """What is measured for `case` on `arch`: descriptors where a copy engine reads them, bounds where they exist.

    On Hopper, of which measurements are known, few, and the kernel made for it; where this Triton lacks what that is
    written in, descriptors in its place.
    """
    from fpe_kernels.backends.triton import hopper
    from fpe_kernels.backends.triton.configs import SHARED_MEMORY

    if case.layout == "guided":
        return [Launches(True), Launches(False)]
    branches = case.batch // case.maps
    if arch == "sm_90":
        made = hopper_tiles.offered(case.head_dim, branches, case.tokens)
        other = DESCRIBED if isinstance(hopper.kernels(), str) else [Candidate(*astuple(config)) for config in made]
        every = [*PLAUSIBLE, *other]
    else:
        nvidia = arch.startswith("sm_")
        engine = nvidia and int(arch.removeprefix("sm_")) >= 90
        every = [*ALL, *(BOUNDED if nvidia else []), *(DESCRIBED + SPECIALISED if engine else [])]
    return [c for c in every if c.fits(case.head_dim, branches, SHARED_MEMORY[arch])]


def tuning_plan() -> list[Case]:
    """The shapes that decide, the most telling first.

    Two maps of a source and a target, and of one row each, at every length class; more targets; then mixed batches,
    which are one launch or two by what has been found before.
    """

    def cases(tokens: int, targets: int, layout: str, head_dims: Sequence[int] = (64, 40, 80, 128, 160)) -> list[Case]:
        # SD 2's and SDXL's heads are 64 wide, and there are twice as many of them where tokens are few; transformers
        # have twelve and more of 128.
        heads = {64: 10 if tokens >= 4096 else 20, 128: 12}
        side = int(tokens**0.5)
        return [Case("tune", 8 * side, tokens, heads.get(d, 8), d, targets, layout) for d in head_dims]

    plan = [case for tokens in (4096, 1024, 16384) for targets in (1, 0) for case in cases(tokens, targets, "halves")]
    plan += cases(256, 1, "halves", (160, 80, 64)) + cases(256, 0, "halves", (160, 80, 64))
    plan += cases(4096, 3, "pair") + cases(1024, 3, "pair")
    plan += [case for tokens in (1024, 4096, 256) for case in cases(tokens, 1, "guided")]
    return plan + cases(16384, 1, "guided") + cases(1024, 3, "guided")


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
            self._changed.wait_for(lambda: (case, choice) in self._problems or not self._thread.is_alive())
        return self._problems.get((case, choice), "it was not compiled")

    def _compile(self) -> None:
        from fpe_kernels.backends.triton.configs import architecture

        from .gpu.pool import Task, share_out
        from .gpu.programs import COMPILE_LIMIT, worker_count

        arch = architecture(torch.device(self._device))
        subjects = [(case, choice) for case, listed in self._offered.items() for choice in listed]
        tasks = [Task(f"{c.name}@{x}", "benchmarks.gpu.programs:compile_choice", (c, x, arch)) for c, x in subjects]
        place = {task.name: subject for task, subject in zip(tasks, subjects, strict=True)}
        left = lambda: 0.0 if self._closed else self._time_left()  # noqa: E731
        for outcome in share_out(tasks, worker_count(), COMPILE_LIMIT, time_left=left):
            with self._changed:
                missed = "no time was left to compile it" if outcome.skipped else ""
                self._problems[place[outcome.task.name]] = outcome.problem or missed
                self._changed.notify_all()


def _choices_on(device: str) -> Callable[[Case], Sequence[Choice]]:
    from fpe_kernels.backends.triton.configs import architecture

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
