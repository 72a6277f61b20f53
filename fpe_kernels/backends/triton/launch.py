"""A kernel launch as a value: what runs on a device is what compiles offline."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .configs import Config


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that it is called with, in four kinds that the compiler treats differently."""

    kernel: Any
    programs: int
    config: Config
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, int | float]
    constants: Mapping[str, Any]

    def run(self) -> None:
        """Launch on the device of the tensors."""
        with _device_of(next(iter(self.tensors.values()))):
            self.kernel[(self.programs,)](
                **self.tensors,
                **self.numbers,
                **self.constants,
                num_warps=self.config.warps,
                num_stages=self.config.stages,
            )


def _device_of(tensor: Tensor) -> AbstractContextManager:
    # Triton launches on the current device, which need not be the tensors' own.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """``{name}_stride_{axis}`` for every axis, in elements."""
    return {f"{name}_stride_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


def product_precision(dtype: torch.dtype) -> str:
    """How products are computed: float32 exactly, unless the user allows TF32 for PyTorch's own products."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return "widen"
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
