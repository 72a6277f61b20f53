"""How peak memory is taken: by counting allocations, so that the number is the same every time.

On a GPU the caching allocator keeps the statistics. On a CPU, PyTorch's allocator reports every allocation
and release to the profiler, the temporary buffers inside an operator too, and the peak is the largest running
sum. The resident set of the process would be the alternative; it also counts what the C library has not given
back yet, and differs from run to run. `tests/benchmarks/test_memory_counter.py` holds the two against each
other in a fresh process.

What neither sees: scratch memory that oneDNN and MKL allocate by themselves inside a convolution or a matrix
product.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# The profiler announces its start and stop on stderr unless told otherwise before its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Counted:
    """A call whose allocations were counted: its result, the most bytes at once, and its time by the wall clock."""

    result: object
    peak: int
    milliseconds: float


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes held at once during `call` beyond those held when it began; its result counts too."""
    return counted(call, device).peak


def counted(call: Callable[[], object], device: str = "cpu") -> Counted:
    """`call`, counted. On a CPU counting takes some microseconds for each operation of PyTorch's: it is in the time."""
    gc.collect()
    return _counted_cuda(call, device) if device.startswith("cuda") else _counted_cpu(call)


def _counted_cuda(call: Callable[[], object], device: str) -> Counted:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter_ns()
    result = call()
    torch.cuda.synchronize(device)
    took = (time.perf_counter_ns() - began) / 1e6
    return Counted(result, torch.cuda.max_memory_allocated(device) - before, took)


def _counted_cpu(call: Callable[[], object]) -> Counted:
    from torch.autograd.profiler import profile

    with profile(profile_memory=True) as profiler:
        began = time.perf_counter_ns()
        result = call()
        took = (time.perf_counter_ns() - began) / 1e6
    changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in changes:
        held += event.nbytes()
        peak = max(peak, held)
    return Counted(result, peak, took)
