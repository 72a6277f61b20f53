"""A kernel launch as a value: what runs on a device is what compiles offline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
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
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, int | float]
    constants: Mapping[str, Any]
    boxes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the tensors that the kernel reads in boxes, by descriptors: the shape of a box."""

    def run(self) -> None:
        """Launch on the device of the tensors."""
        with _device_of(next(iter(self.tensors.values()))):
            self.kernel[(self.programs,)](
                **{name: self._argument(name, tensor) for name, tensor in self.tensors.items()},
                **self.numbers,
                **self.constants,
                **self.config.options,
            )

    def _argument(self, name: str, tensor: Tensor) -> Tensor | TensorDescriptor:
        box = self.boxes.get(name)
        return tensor if box is None else TensorDescriptor.from_tensor(tensor, list(box))


_REMEMBERED: dict[tuple, tuple[Launch, tuple[tuple[str, int | Tensor], ...]]] = {}
_REMEMBERED_AT_MOST = 4096


def prepared(prepare: Callable[..., Launch], *arguments: Any) -> Launch:
    """``prepare(*arguments)``, worked out once for tensors of the same layout.

    A launch follows from shapes, strides, dtypes and alignments, never from contents, and a short attention takes less
    time on a GPU than working it out takes Python.
    """
    key = (prepare, torch.backends.cuda.matmul.allow_tf32, *map(_layout, arguments))
    found = _REMEMBERED.get(key)
    if found is None:
        launch = prepare(*arguments)
        sources = tuple((name, _source(prepare, name, arguments, tensor)) for name, tensor in launch.tensors.items())
        if len(_REMEMBERED) >= _REMEMBERED_AT_MOST:
            _REMEMBERED.clear()
        _REMEMBERED[key] = replace(launch, tensors={}), sources
        return launch
    launch, sources = found
    return replace(
        launch,
        tensors={name: arguments[place] if isinstance(place, int) else place for name, place in sources},
    )


def _source(prepare: Callable[..., Launch], name: str, arguments: tuple, tensor: Tensor) -> int | Tensor:
    """Where the tensor ``name`` of a launch comes from: the place of its argument, or a tensor to keep (a table)."""
    parameters = list(inspect.signature(prepare).parameters)
    parameter = name.removesuffix("_ptr")
    if parameter not in parameters:
        return tensor
    place = parameters.index(parameter)
    # An absent bias is never read; the kernel still wants a pointer, and gets that of the first tensor.
    return 0 if arguments[place] is None else place


def _layout(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return argument.dtype, argument.shape, argument.stride(), argument.device, argument.data_ptr() % 16


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
