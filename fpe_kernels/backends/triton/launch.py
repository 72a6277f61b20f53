"""A kernel launch as a value: what runs on a device is what compiles offline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Config


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that it is called with, in four kinds that the compiler treats differently."""

    kernel: Any
    programs: int
    config: Config
    tensors: Mapping[str, Tensor | None]
    numbers: Mapping[str, int | float | tuple[int, ...] | None]
    constants: Mapping[str, Any]
    boxes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the tensors that the kernel reads in boxes, by descriptors: the shape of a box."""
    descriptor: Callable[[Tensor, list[int], list[int], list[int]], Any] = TensorDescriptor
    """Makes one of a tensor, its shape, its strides and the shape of a box."""

    def run(self) -> Any:
        """Launch on the device of the tensors; returns the compiled kernel, or None from the interpreter."""
        with device_of(self.first):
            return self.kernel[(self.programs,)](**self._arguments())

    def compile(self) -> Any:
        """Compile for the device of the tensors, into Triton's cache on disk too, and launch nothing."""
        with device_of(self.first):
            return self.kernel.warmup(grid=(self.programs,), **self._arguments())

    @property
    def first(self) -> Tensor:
        """A tensor that is there; the device of all."""
        return next(tensor for tensor in self.tensors.values() if tensor is not None)

    def _arguments(self) -> dict[str, Any]:
        return {
            **{name: self.argument(name, tensor) for name, tensor in self.tensors.items()},
            **self.numbers,
            **self.constants,
            **self.config.options,
        }

    def argument(self, name: str, tensor: Tensor | None) -> Any:
        """What the kernel is given for one of ``tensors``: itself, or a descriptor of it."""
        box = self.boxes.get(name)
        if box is None or tensor is None:
            return tensor
        return self.descriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box))


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors' own: inside, it is."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def folds(scale: float) -> bool:
    """Whether a scale may multiply scores that the end of the keys has masked, and their maximum.

    It has to be positive as a kernel gets it, in float32, where the smallest floats are zero: zero times -inf is none.
    """
    return scale >= torch.finfo(torch.float32).tiny


def allows_tf32() -> bool:
    """Whether the user allows TF32 for PyTorch's own products, by whichever of its two settings.

    The older flag may not be read once the newer one, of PyTorch 2.9, has been set.
    """
    try:
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    except AttributeError:
        return bool(torch.backends.cuda.matmul.allow_tf32)


def product_precision(dtype: torch.dtype) -> str:
    """How products are computed: float32 exactly, unless the user allows TF32 for PyTorch's own products."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return "widen"
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"
