"""Blocks of work that CPU threads take as they come free, each thread computing its block alone.

PyTorch shares every operation out over all threads and waits for the last of them. A block of attention is many
operations, so where another process takes a core away, each of them waits for the thread that lost it. Threads that
take whole blocks wait for one another once, at the end. For that PyTorch's operators have to run on one thread inside a
worker, which is a setting of the thread in OpenMP and in MKL, but of the process in PyTorch:
:func:`torch.set_num_threads` would change it for everybody. So the two libraries that PyTorch has loaded are asked
themselves; where that cannot be done, blocks are computed one after the other by all threads together, as any PyTorch
code is.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

Task = Callable[[], None]


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
        if _watched():
            try:
                for number, task in enumerate(tasks):
                    _PLACE.lane = number % threads
                    task()
            finally:
                _PLACE.lane = 0  # what the calling thread is in its next call
            return
        queue = deque(tasks)
        inference, pool = torch.is_inference_mode_enabled(), _workers(os.getpid())
        others = [pool.submit(_work, queue, lane, inference, settings) for lane in range(1, threads)]
        try:
            _take(queue)
        finally:
            queue.clear()  # after an error or an interrupt nobody begins another one
            _join(others)


def lane() -> int:
    """Which of the threads of :func:`share_out` this one is: what is kept for each of them is kept by this number."""
    return getattr(_PLACE, "lane", 0)


_PLACE = threading.local()


def _watched() -> bool:
    """Whether a profiler or a mode follows what the calling thread does, which would not see other threads.

    Then it computes everything itself, in the lanes that the threads would have had.
    """
    c: Any = torch._C
    return bool(c._len_torch_dispatch_stack() or c._len_torch_function_stack() or c._autograd._profiler_enabled())


def threads_compute_alone() -> bool:
    """Whether :func:`share_out` has more than one thread, each computing its task alone."""
    return torch.get_num_threads() > 1 and _settings() is not None


def _join(others: list[Future[None]]) -> None:
    """Wait for all of them; raise the first error."""
    problems = [problem for other in others if (problem := other.exception()) is not None]
    if problems:
        raise problems[0]


def _take(queue: deque[Task]) -> None:
    while True:
        try:
            task = queue.popleft()
        except IndexError:
            return
        task()


def _work(queue: deque[Task], lane: int, inference: bool, settings: _Settings) -> None:
    """A worker's share: operators on one thread, and nothing recorded for gradients, as in the thread that waits."""
    _PLACE.lane = lane
    with settings.one_thread(), torch.inference_mode() if inference else torch.no_grad():
        _take(queue)


@cache
def _workers(process: int) -> ThreadPoolExecutor:
    """The threads of a process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="fpe_kernels")


@dataclass(frozen=True)
class _Settings:
    """The functions that say how many threads the calling thread's operations take."""

    omp_get: Any
    omp_set: Any
    mkl_set: Any  # None where PyTorch is built without MKL

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
        openmp = ctypes.CDLL(_openmp())
        settings = _Settings(openmp.omp_get_max_threads, openmp.omp_set_num_threads, _mkl())
    except (OSError, AttributeError, LookupError):
        return None
    return settings if _works(settings) else None


def _openmp() -> str:
    """The path of the OpenMP library that PyTorch has loaded.

    Raises:
        LookupError: if there is none or more than one: which of them PyTorch calls is not known then.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
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
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).MKL_Set_Num_Threads_Local


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
