"""The chips whose rules are in :mod:`.configs`: what a program may hold there, and how many run side by side."""

from __future__ import annotations

from functools import lru_cache

import torch

SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
"""Bytes of shared memory that one program may use: CUDA C++ programming guide, table of technical specifications by
compute capability ("maximum amount of shared memory per thread block"); for gfx942, the LDS of a compute unit."""


MULTIPROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
}
"""Multiprocessors of A100, RTX A6000, RTX 4090, H100 SXM, B200, RTX 5090 and MI300X: the vendors' white papers."""


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> str:
    """The key of :data:`SHARED_MEMORY` whose rules serve ``device``; the interpreter takes those of sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = [name for name in SHARED_MEMORY if name.startswith("sm_") and int(name[3:]) <= 10 * major + minor]
    return max(known, key=lambda name: int(name[3:]))
