"""Whole steps under ``torch.compile``, edited and not: compiled in processes of their own, then timed in turns.

A UNet takes its compiler minutes on one core. So every editor of every case is compiled at once, and nothing is timed
before all are ready; then each process takes its samples when it is told to, the editors of a case in the same rounds.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from .editors import EDITORS
from .edits import in_a_row, judge_of
from .measure import Clock, Effort
from .rows import Row
from .run import Bench, first_line
from .unets import COMPILED, UNetCase, build, twin, unet_inputs
from .workers.pool import starting

log = logging.getLogger("benchmarks")

NAMES = ("unedited", "fpe")
WARM = 3  # calls: one compiles, one records a graph, one replays it
REDUCED = {"mode": "reduce-overhead"}  # of torch.compile: CUDA graphs are replayed
COMPILERS = 2  # processes in which inductor compiles, of each of ours

Place = tuple[UNetCase, str]


@dataclass(frozen=True)
class Made:
    """What a process has compiled, or why it has not: its error and budget, and what a sample takes."""

    problem: str = ""
    error: float = 0.0
    budget: float = 0.0
    sample_ms: float = 0.0


def run_compiled(
    bench: Bench,
    cases: Sequence[UNetCase],
    names: Sequence[str] = NAMES,
    *,
    options: Mapping[str, Any] = REDUCED,
    time_left: Callable[[], float] = lambda: float("inf"),
) -> Iterator[list[Row]]:
    """Rows of each case, the editors of it timed in the same rounds by the wall clock.

    Args:
        options: of ``torch.compile``.
        time_left: seconds; what has not been compiled when they are over is a failed row.
    """
    with _compiling(bench, cases, names, options) as (pipes, end):
        made = {place: _answer(pipe, time_left) for place, pipe in pipes.items()}
        for place, found in made.items():
            if found.problem:
                end(place)  # one that is late would go on beside the others' rounds
        for case in cases:
            rows: list[Row] = []
            ready: dict[str, dict[str, Any]] = {}
            for name in names:
                found = made[case, name]
                about: dict[str, Any] = {"suite": "edits", "case": case.name, "provider": f"{name}{COMPILED}"}
                if found.problem:
                    rows.append(bench.row(**about, status="failed", reason=found.problem))
                    continue
                about |= {"error": found.error, "budget": found.budget}
                if not found.error <= found.budget:
                    reason = f"relative error {found.error:.2e} exceeds its budget of {found.budget:.2e}"
                    rows.append(bench.row(**about, status="wrong", reason=reason))
                    continue
                ready[name] = about
            rounds = _rounds(bench.effort, made, case, ready)
            samples, lost = _in_turns({name: pipes[case, name] for name in ready}, rounds)
            rows += [bench.row(**ready[name], status="failed", reason=reason) for name, reason in lost.items()]
            yield rows + [bench.row(**ready[name], status="ok", samples_ms=taken) for name, taken in samples.items()]


def _rounds(effort: Effort, made: Mapping[Place, Made], case: UNetCase, names: Iterable[str]) -> int:
    a_round = sum(made[case, name].sample_ms for name in names)
    return max(effort.least_rounds, min(effort.rounds, int(1e3 * effort.seconds / max(a_round, 1e-3))))


def _in_turns(pipes: Mapping[str, Connection], rounds: int) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    """Samples by name; and what went wrong with those that could not go on, which get none."""
    names = list(pipes)
    samples: dict[str, list[float]] = {name: [] for name in names}
    lost: dict[str, str] = {}
    for number in range(rounds if names else 0):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name in lost:
                continue
            taken = _sample(pipes[name])
            if isinstance(taken, Made):
                lost[name] = taken.problem
            else:
                samples[name].append(taken)
    return {name: tuple(taken) for name, taken in samples.items() if name not in lost}, lost


def _sample(pipe: Connection) -> float | Made:
    try:
        pipe.send("sample")
        return pipe.recv()
    except (EOFError, OSError):
        return Made("the process that compiled it has ended")


def _answer(pipe: Connection, time_left: Callable[[], float]) -> Made:
    try:
        # As long as it takes where no end is set.
        return pipe.recv() if pipe.poll(min(max(time_left(), 0.0), 1e6)) else Made("it was not compiled in time")
    except EOFError:
        return Made("the process that compiled it has ended")


@contextmanager
def _compiling(
    bench: Bench, cases: Sequence[UNetCase], names: Sequence[str], options: Mapping[str, Any]
) -> Iterator[tuple[dict[Place, Connection], Callable[[Place], None]]]:
    """A process for each case and editor, ended with the block; and what ends one before."""
    processes: dict[Place, Any] = {}
    pipes = {}
    try:
        for case in cases:
            for name in names:
                ours, theirs = starting().Pipe()
                arguments = (theirs, bench.device, bench.dtype, bench.effort, case, name, dict(options))
                process = starting().Process(target=_serve, args=arguments)
                process.start()
                theirs.close()
                processes[case, name] = process
                pipes[case, name] = ours
        yield pipes, lambda place: processes[place].kill()
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join(2.0)  # one that the driver holds on to is left behind


def _serve(
    pipe: Connection,
    device: str,
    dtype: torch.dtype,
    effort: Effort,
    case: UNetCase,
    name: str,
    options: Mapping[str, Any],
) -> None:
    """In a process: compile, say so, and take a sample whenever that is asked for."""
    import torch._inductor.config as inductor

    inductor.compile_threads = COMPILERS
    bench = Bench(device, dtype, effort)
    try:
        unet = build(case.model, device, dtype)
        judge = judge_of(bench, case, unet)
        module = twin(unet)
        with EDITORS[name](module, case) as set_step, torch.no_grad():
            arguments, keywords = unet_inputs(case, module, device, dtype)
            compiled = torch.compile(module, **options)

            def step() -> Tensor:
                set_step(0)
                return compiled(*arguments, **keywords, return_dict=False)[0]

            for _ in range(WARM):
                out = step()
            error, budget = judge(name, out)
            row = in_a_row(device, case)
            clock = Clock(device, wall=True, in_a_row=row)
            estimate = row * min(clock.calls(step, 2))
            count = max(1, min(effort.calls_a_sample, int(effort.sample_ms / max(estimate, 1e-3))))
            pipe.send(Made(error=error, budget=budget, sample_ms=count * estimate))
            while True:
                pipe.recv()
                pipe.send(statistics.median(clock.calls(step, count)))
    except EOFError:
        return
    except Exception as problem:
        log.debug("%s cannot be compiled", name, exc_info=True)
        pipe.send(Made(first_line(problem)))
