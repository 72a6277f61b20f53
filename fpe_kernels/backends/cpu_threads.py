"""Blocks of work that CPU threads take as they come free, each thread computing its block alone.

PyTorch shares every operation out over all threads and waits for the last of them. A block of attention is many
operations, so where another process takes a core away, each of them waits for the thread that lost it. Threads that
take whole blocks wait for one another once, at the end. For that PyTorch's operators have to run on one thread inside a
worker, which is a setting of the thread in OpenMP and in MKL, but of the process in PyTorch:
:func:`torch.set_num_threads` would change it for everybody. So the two libraries that PyTorch has loaded are asked
themselves; where that cannot be done, blocks are computed one after the other by all threads together, as any PyTorch
code is.

The threads are those of OpenMP, where its library offers to run a function in each of them. Between two operations of
PyTorch they wait in a loop, so they begin at once; threads of our own would have to be woken, and to share their cores
with the waiting ones for as long as these keep at it, some milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

Task = Callable[[], None]

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# The process whose OpenMP has these threads. A forked one has none of them, and libgomp would wait for them forever.
_PROCESS = os.getpid()


def share_out(tasks: Sequence[Task]) -> None:
    """Call every task once; by several threads at the same time where there are several of both.

    Tasks must not depend on one another or write to the same memory. What one raises is raised, after the others that
    were under way have ended.
    """
    threads = min(torch.get_num_threads(), len(tasks))
    settings = _settings() if threads > 1 else None
    if settings is None:
        for task in tasks:
            task()
        return
    with settings.one_thread():
        if watched():
            try:
                for number, task in enumerate(tasks):
                    _PLACE.lane = number % threads
                    task()
            finally:
                _PLACE.lane = 0  # what the calling thread is in its next call
            return
        inference = torch.is_inference_mode_enabled()
        if settings.team is not None and os.getpid() == _PROCESS:
            _by_team(tasks, threads, inference, settings)
        else:
            _by_workers(tasks, threads, inference, settings)


def _by_team(tasks: Sequence[Task], threads: int, inference: bool, settings: _Settings) -> None:
    """By OpenMP's threads, of which the calling one is the first."""
    queue, done, problems = deque(tasks), deque[Task](), deque[BaseException]()

    def member(_: int | None) -> None:
        try:
            _work(queue, done, settings.omp_place(), inference, settings)
        except BaseException as problem:  # nothing is raised through a library of C
            queue.clear()
            problems.append(problem)

    try:
        settings.team(_Callback(member), None, threads, 0)
    finally:
        _PLACE.lane = 0  # what the calling thread is in its next call
    if problems:
        raise problems[0]
    # An interrupt at the very begin or end of a member is lost in the library, and what that thread was to do is not.
    _take(queue, done)
    if len(done) != len(tasks):
        raise KeyboardInterrupt


def _by_workers(tasks: Sequence[Task], threads: int, inference: bool, settings: _Settings) -> None:
    """By the calling thread and threads that are kept for this."""
    queue, done, pool = deque(tasks), deque[Task](), _workers(os.getpid())
    others = [pool.submit(_work, queue, done, lane, inference, settings) for lane in range(1, threads)]
    try:
        _take(queue, done)
    finally:
        queue.clear()  # after an error or an interrupt nobody begins another one
        _join(others)


def lane() -> int:
    """Which of the threads of :func:`share_out` this one is: what is kept for each of them is kept by this number."""
    return getattr(_PLACE, "lane", 0)


_PLACE = threading.local()


def watched() -> bool:
    """Whether a profiler or a mode follows what the calling thread does, which would not see other threads.

    Then it computes everything itself, in the lanes that the threads would have had.
    """
    c: Any = torch._C
    return bool(c._len_torch_dispatch_stack() or c._len_torch_function_stack() or c._autograd._profiler_enabled())


def threads_compute_alone() -> bool:
    """Whether :func:`share_out` has more than one thread, each computing its task alone."""
    return torch.get_num_threads() > 1 and _settings() is not None


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block the calling thread computes alone, where it can be told to: small work waits for no other."""
    settings = _settings() if torch.get_num_threads() > 1 else None
    if settings is None:
        yield
        return
    with settings.one_thread():
        yield


def _join(others: list[Future[None]]) -> None:
    """Wait for all of them; raise the first error."""
    problems = [problem for other in others if (problem := other.exception()) is not None]
    if problems:
        raise problems[0]


def _take(queue: deque[Task], done: deque[Task]) -> None:
    while True:
        try:
            task = queue.popleft()
        except IndexError:
            return
        task()
        done.append(task)


def _work(queue: deque[Task], done: deque[Task], lane: int, inference: bool, settings: _Settings) -> None:
    """A thread's share: operators on one thread, and nothing recorded for gradients, as in the thread that waits."""
    _PLACE.lane = lane
    with settings.one_thread(), torch.inference_mode() if inference else torch.no_grad():
        _take(queue, done)


@cache
def _workers(process: int) -> ThreadPoolExecutor:
    """The threads of a process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="fpe_kernels")


@dataclass(frozen=True)
class _Settings:
    """The functions that say how many threads the calling thread's operations take, and that use them."""

    omp_get: Any
    omp_set: Any
    omp_place: Any  # which thread of a team the calling one is
    mkl_set: Any  # None where PyTorch is built without MKL
    team: Any  # runs a callback in so many threads; None where OpenMP's library does not offer it

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Inside the block the calling thread computes alone."""
        torch.get_num_threads()  # PyTorch sets a thread's number when it is first asked, so that has to be over
        before = self.omp_get()
        before_mkl = self.mkl_set(1) if self.mkl_set else 0
        self.omp_set(1)
        try:
            yield
        finally:
            self.omp_set(before)
            if self.mkl_set:
                self.mkl_set(before_mkl)


@cache
def _settings() -> _Settings | None:
    """The settings, after a trial in a thread of its own; None where they are not found or do nothing."""
    try:
        path = _openmp()
        openmp = ctypes.PyDLL(path)  # functions that return at once: Python's lock is not to change hands for them
        functions = openmp.omp_get_max_threads, openmp.omp_set_num_threads, openmp.omp_get_thread_num
        settings = _Settings(*functions, _mkl(), None)
    except (OSError, AttributeError, LookupError):
        return None
    if not _works(settings):
        return None
    team = getattr(ctypes.CDLL(path), "GOMP_parallel", None)  # LLVM's and Intel's libraries have it too, on Linux
    if team is None:
        return settings
    team.argtypes, team.restype = (_Callback, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    with_team = replace(settings, team=team)
    return with_team if _team_works(with_team) else settings


def _openmp() -> str:
    """The path of the OpenMP library that PyTorch has loaded.

    Raises:
        LookupError: if there is none or more than one: which of them PyTorch calls is not known then.
    """
    maps = Path("/proc/self/maps")
    # Names of files are bytes: one that is not UTF-8 is nobody's fault, whoever has mapped it.
    lines = os.fsdecode(maps.read_bytes()).splitlines() if maps.exists() else []
    names = ("libgomp", "libomp", "libiomp")
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    found = {path for path in paths if Path(path).name.startswith(names)}
    (only,) = found if len(found) == 1 else ("",)
    if not only:
        raise LookupError(f"{len(found)} OpenMP libraries are loaded")
    return only


def _mkl() -> Any:
    """MKL's setting of a thread, out of PyTorch's own library; None where PyTorch does not have MKL."""
    if not torch.backends.mkl.is_available():
        return None
    return ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).MKL_Set_Num_Threads_Local


def _works(settings: _Settings) -> bool:
    """Whether a thread's setting is its own: 1 inside, and as before for everybody else."""
    if torch.get_num_threads() == 1:
        return False
    seen: list[int] = []

    def trial() -> None:
        with settings.one_thread():
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    thread = threading.Thread(target=trial)
    thread.start()
    thread.join()
    return seen == [1] and torch.get_num_threads() == before


def _team_works(settings: _Settings) -> bool:
    """Whether a team has the threads that it is asked for, and they compute alone."""
    seen: deque[tuple[int, int]] = deque()
    both = threading.Barrier(2)

    def task() -> None:
        seen.append((lane(), torch.get_num_threads()))
        both.wait(timeout=10.0)

    try:
        _by_team([task, task], 2, False, settings)
    except threading.BrokenBarrierError:
        return False
    return sorted(seen) == [(0, 1), (1, 1)]
