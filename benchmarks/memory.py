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
from collections.abc import Callable

import torch

# The profiler announces its start and stop on stderr unless told otherwise before its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes held at once during `call` beyond those held when it began; its result counts too."""
    gc.collect()
    return _peak_cuda(call, device) if device.startswith("cuda") else _peak_cpu(call)


def _peak_cuda(call: Callable[[], object], device: str) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def _peak_cpu(call: Callable[[], object]) -> int:
    from torch.autograd.profiler import profile

    with profile(profile_memory=True) as profiler:
        result = call()
    del result
    changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in changes:
        held += event.nbytes()
        peak = max(peak, held)
    return peak
