"""What lets a run be repeated and compared: pinned arithmetic, versions, the machine, the time of each stage."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from ..models.sources import is_embedded

__all__ = ["Clock", "arithmetic", "machine", "repeatable", "set_arithmetic", "threads_for", "versions"]


def versions() -> dict[str, str | None]:
    """Versions of what decides the images; None for what is not installed."""
    from fpe_kernels import __version__

    found: dict[str, str | None] = {"fpe": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "triton", "numpy", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine(device: str) -> dict[str, Any]:
    """What a run was made on."""
    import torch

    accelerator = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # which instructions sum, and so how they round
        "accelerator": accelerator,
        "cuda": torch.version.cuda,
    }


def threads_for(model: str, device: str) -> int | None:
    """How many CPU threads a run takes that does not say: one for the embedded model, else torch's choice, as None.

    What is left to threads there is PyTorch's own: convolutions and linear layers so small that a second thread gains
    little, and on a machine that has other work these wait for one another many times longer than they compute; the
    attention of this package does not. ``OMP_NUM_THREADS`` stands where it is set.
    """
    small = is_embedded(model) and device == "cpu"
    return 1 if small and "OMP_NUM_THREADS" not in os.environ else None


def arithmetic() -> tuple[int, bool, bool]:
    """How this process rounds just now: threads, and whether cuDNN is deterministic and tries algorithms out."""
    import torch

    return torch.get_num_threads(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark


def set_arithmetic(values: tuple[int, bool, bool]) -> None:
    """Round as :func:`arithmetic` said."""
    import torch

    threads, deterministic, benchmark = values
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark


@contextlib.contextmanager
def repeatable(threads: int | None) -> Iterator[None]:
    """Pin what would let two runs of the same settings round differently; put everything back afterwards."""
    before = arithmetic()
    set_arithmetic((before[0] if threads is None else threads, True, False))
    try:
        yield
    finally:
        set_arithmetic(before)


class Clock:
    """Seconds of named stages, rounded to milliseconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
