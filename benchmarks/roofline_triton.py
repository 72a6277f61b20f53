"""The exponential ceiling of a GPU: exp2 on registers, no memory in the way.

    x ← exp2(x) − 3/2, repeated        (settles at −1, far from overflow and from denormal numbers)

Imported only where a CUDA device is measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .measure import Call

BLOCK, REPEATS = 4096, 256


@triton.jit
def exponential_kernel(out_ptr, REPEATS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes one block a program, so that nothing of the loop can be removed."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = -1.0 / (1.0 + tl.arange(0, BLOCK).to(tl.float32))
    for _ in range(REPEATS):
        x = tl.exp2(x) - 1.5
    tl.store(out_ptr + offsets, x)


def exponential(device: str) -> tuple[Call, int]:
    """The launch, and how many exponentials one launch computes."""
    programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs * BLOCK, device=device, dtype=torch.float32)

    def call() -> None:
        exponential_kernel[(programs,)](out, REPEATS=REPEATS, BLOCK=BLOCK, num_warps=8)

    return call, programs * BLOCK * REPEATS
