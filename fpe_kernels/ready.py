"""Calls of ``shared_attention`` that have been made before, ready to be launched again.

What a call checks, chooses and launches follows from the layouts of its tensors and from its other arguments, never
from contents. A call that succeeded leaves a *ready call*, made by its backend: the next one like it allocates its
output and launches or computes. That passes by PyTorch's dispatcher, which takes longer than a short attention; where
the dispatcher has anything to do besides finding the implementation (gradients, modes, transforms, tracing, a
profiler), nothing is ready.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Of query, key and value; it gives None where what it was made by has changed.
ReadyCall = Callable[[Tensor, Tensor, Tensor], Tensor | None]


class Kept(NamedTuple):
    """A ready call, and which tensors it is for."""

    alike: Callable[[Tensor, Tensor, Tensor], bool]
    of_graph: bool  # there would be gradients, if they were enabled
    call: ReadyCall


_AT_MOST = 4096
_ALTERNATIVES = 8
_READY: dict[tuple[Any, ...], list[Kept]] = {}

# What PyTorch is asked at each call, as directly as it can be: a short attention finds its call in a cold cache, where
# every name that is looked up counts. PyTorch's own guards compare three tensors at once: types, sizes, strides,
# dtypes, devices, and the keys by which the dispatcher chooses here and now, which modes, transforms, tracing,
# autocast, other layouts, conjugates and gradients change. A release that has not all of it gets no ready calls.
_C: Any = torch._C
_grad_enabled = torch.is_grad_enabled
_Guards: Any = None
try:
    _function_modes: Callable[[], int] = _C._len_torch_function_stack
    _profiled: Callable[[], bool] = _C._autograd._profiler_enabled
    _dispatch_modes: Callable[[], int] = _C._len_torch_dispatch_stack
    _transform: Callable[[], object] = _C._functorch.maybe_current_level
    _tracing: Callable[[], object] = _C._get_tracing_state
    if hasattr(forward_ad, "_current_level"):
        _Guards = _C._dynamo.guards.TensorGuards
except AttributeError:
    pass


def forget() -> None:
    """Have no call ready."""
    _READY.clear()


def call(query: Any, key: Any, value: Any, map_index: Any, scale: Any, backend: Any) -> Tensor | None:
    """``shared_attention`` of these arguments, as they were given; None where no such call is ready."""
    if type(query) is not Tensor or type(backend) is not str:
        return None
    name = _name(query, map_index, scale, backend)
    alternatives = _READY.get(name) if name is not None else None
    if alternatives is None or _function_modes() or _profiled() or forward_ad._current_level >= 0:
        return None
    for kept in alternatives:
        if kept.alike(query, key, value) and not (kept.of_graph and _grad_enabled()):
            out = kept.call(query, key, value)
            if out is not None:
                return out
    return None


def keep(
    query: Any,
    key: Any,
    value: Any,
    map_index: Any,
    scale: Any,
    backend: Any,
    checked_scale: float,
    out: Tensor,
    make: Callable[..., ReadyCall | None],
) -> None:
    """Have the call of these arguments ready from now on, if it can be.

    Args:
        checked_scale: the number that ``scale`` stands for.
        out: what the call gave.
        make: the ready call that a backend has for it, or None.
    """
    name = _name(query, map_index, scale, backend)
    tensors = query, key, value
    if name is None or _Guards is None or not all(_plain(tensor) for tensor in tensors):
        return
    of_graph = any(tensor.requires_grad for tensor in tensors)
    if of_graph and _grad_enabled():
        return
    if _function_modes() or _dispatch_modes() or _transform() is not None or _tracing() is not None or _profiled():
        return
    if forward_ad._current_level >= 0:
        return
    made = make(query, key, value, tuple(map_index), checked_scale, out)
    if made is None:
        return
    if len(_READY) >= _AT_MOST:
        _READY.clear()
    alike = _Guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    _READY[name] = [Kept(alike, of_graph, made), *_READY.get(name, ())][:_ALTERNATIVES]


def _name(query: Tensor, map_index: Any, scale: Any, backend: str) -> tuple[Any, ...] | None:
    """What kept calls are found by; None for arguments that have to be checked."""
    index = map_index if type(map_index) is tuple else tuple(map_index) if type(map_index) is list else ()
    for entry in index:
        if type(entry) is not int:  # True equals 1, and is no index
            return None
    if not index or not (scale is None or type(scale) is float or type(scale) is int):
        return None
    return index, query.shape, scale, backend


def _plain(tensor: Any) -> bool:
    """Whether nothing but the implementation and autograd has to see this tensor; other layouts have no address."""
    return type(tensor) is Tensor and not tensor.is_neg() and tensor.layout is torch.strided
