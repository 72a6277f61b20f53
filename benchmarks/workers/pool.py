"""Tasks shared out over processes that may hang, abort or be killed without taking anything else along.

Each worker has one task at a time. One that does not answer within the task's limit is killed, one that dies is
noticed by its death, and in both cases the task is named and a fresh worker takes the next one.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, ForkServerContext, SpawnContext
from typing import Any

PATIENCE = 0.5  # seconds between looks at the clock
STARTUP = 60.0  # seconds that a worker may take to import what its first task needs, beside the task's own limit


@dataclass(frozen=True)
class Task:
    """A call in a worker: `call` is "package.module:function", `arguments` are pickled."""

    name: str
    call: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a task: its value; or what went wrong; or that there was no time left for it."""

    task: Task
    value: Any = None
    problem: str = ""
    skipped: bool = False
    seconds: float = 0.0


def resolve(call: str) -> Callable[..., Any]:
    """The function that "package.module:function" names."""
    module, _, name = call.partition(":")
    return getattr(importlib.import_module(module), name)


START = "FPE_GPU_START"  # in the environment, so that what a stage starts is started alike
# A process that has asked the CUDA runtime for its devices cannot be forked from; NVML may be asked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def starting() -> ForkContext | ForkServerContext | SpawnContext:
    """How processes are started: forked from one that has imported what they need, and nothing else.

    Where :func:`cuda_after_fork` has found that this does not work, each imports for itself.
    """
    if os.environ.get(START) == "spawn":
        return get_context("spawn")
    if "benchmarks.workers.preload" in sys.modules and not sys.modules["torch"].cuda.is_initialized():
        return get_context("fork")  # this process is itself such a fork, and has opened nothing yet
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.workers.preload"])
    return context


def warm_up() -> None:
    """Have the process that others are forked from import what it imports."""
    process = starting().Process(target=int)
    process.start()
    process.join()


def cuda_after_fork() -> bool:
    """Whether a forked process can use the device: what it is forked from may have opened it while importing."""
    process = starting().Process(target=_open_device)
    process.start()
    process.join(STARTUP)
    if process.exitcode == 0:
        return True
    process.kill()
    os.environ[START] = "spawn"
    return False


def _open_device() -> None:
    import torch

    torch.zeros(1, device="cuda").add_(1).item()


class _Worker:
    """A process with a pipe, and the task that it is at."""

    def __init__(self, setup: str) -> None:
        context = starting()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setup), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.began = 0.0
        self.fresh = True

    def give(self, task: Task) -> None:
        self.task, self.began = task, time.monotonic()
        self.pipe.send((task.call, task.arguments))

    def end(self) -> None:
        self.process.kill()
        self.process.join(2.0)  # one that the driver holds on to is left behind
        self.pipe.close()


def _serve(pipe: Connection, setup: str) -> None:
    """A worker's life: a call in, its value or its error out, until the pipe closes."""
    if setup:
        resolve(setup)()
    while True:
        try:
            call, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("value", resolve(call)(*arguments))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            words = str(error).strip().splitlines() or ["no message"]
            answer = ("problem", f"{type(error).__name__}: {words[0][:300]} ({last.filename}:{last.lineno})")
        pipe.send(answer)


def share_out(
    tasks: Sequence[Task],
    workers: int,
    limit: float,
    *,
    startup: float = STARTUP,
    setup: str = "",
    time_left: Callable[[], float] = lambda: float("inf"),
    began: Callable[[Task], None] = lambda task: None,
) -> Iterator[Outcome]:
    """The outcomes of `tasks`, as they come.

    Args:
        tasks: in the order in which they are begun.
        workers: processes at most.
        limit: seconds for a task.
        startup: seconds more for a worker's first task, for its imports.
        setup: "package.module:function", called once in each worker.
        time_left: seconds until everything ends; what is not begun by then is skipped, what is under way is named.
        began: told of each task that starts.
    """
    queue = deque(tasks)
    crew: list[_Worker] = []
    try:
        while queue or any(worker.task for worker in crew):
            if time_left() <= 0:
                yield from _close(queue, crew)
                return
            while queue and (idle := next((w for w in crew if w.task is None), None) or _hire(crew, workers, setup)):
                task = queue.popleft()
                began(task)
                idle.give(task)
            waiting = [worker.pipe for worker in crew if worker.task]
            ready = wait(waiting, timeout=min(PATIENCE, max(0.01, time_left())))
            for worker in list(crew):
                outcome = _outcome(worker, worker.pipe in ready, limit + (startup if worker.fresh else 0.0))
                if outcome is None:
                    continue
                worker.task, worker.fresh = None, False
                if outcome.problem.startswith(("hung", "died")):
                    crew.remove(worker)
                    worker.end()
                yield outcome
    finally:
        for worker in crew:
            worker.end()


def _hire(crew: list[_Worker], most: int, setup: str) -> _Worker | None:
    if len(crew) >= most:
        return None
    crew.append(_Worker(setup))
    return crew[-1]


def _outcome(worker: _Worker, ready: bool, allowed: float) -> Outcome | None:
    """What became of a worker's task, if anything did."""
    if worker.task is None:
        return None
    seconds = time.monotonic() - worker.began
    if ready:
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join(2.0)
            return Outcome(worker.task, problem=f"died: {_death(worker.process.exitcode)}", seconds=seconds)
        if kind == "value":
            return Outcome(worker.task, value, seconds=seconds)
        return Outcome(worker.task, problem=value, seconds=seconds)
    if seconds > allowed:
        return Outcome(worker.task, problem=f"hung: no answer within {allowed:.0f} s, killed", seconds=seconds)
    return None


def _close(queue: deque[Task], crew: list[_Worker]) -> Iterator[Outcome]:
    """Nothing is left of the time."""
    for worker in crew:
        if worker.task:
            seconds = time.monotonic() - worker.began
            yield Outcome(worker.task, skipped=True, seconds=seconds)
            worker.task = None
    for task in queue:
        yield Outcome(task, skipped=True)


def _death(status: int | None) -> str:
    if status is None:
        return "its pipe closed"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
