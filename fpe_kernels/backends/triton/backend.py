"""The ``triton`` backend: fused kernels for CUDA devices; on a CPU, through Triton's interpreter, for tests."""

from __future__ import annotations

import torch
import triton

from .adjoint import adjoint
from .forward import apply, apply_merged
from .gradients import score_gradient
from .hopper import missing as without
from .ready import ready_call

__all__ = [
    "adjoint",
    "apply",
    "apply_merged",
    "ready_call",
    "score_gradient",
    "unsupported_reasons",
    "without",
]

# Read when the kernels are imported: a kernel is decorated for the interpreter or for the compiler, once and for all.
INTERPRETED = bool(triton.knobs.runtime.interpret)

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why the kernels cannot serve tensors like these; an empty list means that they can."""
    reasons = []
    if INTERPRETED:
        if device.type != "cpu":
            reasons.append(f"TRITON_INTERPRET=1 runs kernels on the CPU, but the tensors are on {device}")
    elif device.type != "cuda":
        reasons.append(
            f"it needs a CUDA device (or TRITON_INTERPRET=1 in the environment), but the tensors are on {device}"
        )
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        reasons.append("it needs compute capability 8.0 or newer")
    if dtype not in DTYPES:
        reasons.append(f"it takes float16, bfloat16 and float32, not {dtype}")
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"it takes head dims up to {MAX_HEAD_DIM}, not {head_dim}")
    return reasons
