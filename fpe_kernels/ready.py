"""Calls of ``shared_attention`` that have been made before, ready to be launched again.

What a call checks, chooses and launches follows from the layouts of its tensors and from its other arguments, never
from contents. A call that succeeded leaves a *ready call*, made by its backend: the next one like it allocates its
output and launches or computes. That passes by PyTorch's dispatcher, which takes longer than a short attention; where
the dispatcher has anything to do besides finding the implementation (gradients, modes, transforms, tracing, a
profiler), nothing is ready.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Of query, key, value and their addresses; it gives None where what it was made by has changed.
ReadyCall = Callable[[Tensor, Tensor, Tensor, tuple[int, int, int]], Tensor | None]

_AT_MOST = 4096
_READY: dict[tuple, ReadyCall] = {}

# What PyTorch is asked at each call, as directly as it can be. A release that has not all of it gets no ready calls.
_C: Any = torch._C
try:
    _function_modes: Callable[[], int] = _C._len_torch_function_stack
    _dispatch_modes: Callable[[], int] = _C._len_torch_dispatch_stack
    _transform: Callable[[], object] = _C._functorch.maybe_current_level
    _tracing: Callable[[], object] = _C._get_tracing_state
    _profiled: Callable[[], bool] = _C._autograd._profiler_enabled
    _AVAILABLE = hasattr(forward_ad, "_current_level")
except AttributeError:
    _AVAILABLE = False


def forget() -> None:
    """Have no call ready."""
    _READY.clear()


def call(query: Any, key: Any, value: Any, map_index: Any, scale: Any, backend: Any) -> Tensor | None:
    """``shared_attention`` of these arguments, as they were given; None where no such call is ready."""
    if not _READY:
        return None
    found = _layout(query, key, value, map_index, scale, backend)
    ready = None if found is None else _READY.get(found[0])
    return None if ready is None or found is None else ready(query, key, value, found[1])


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
    found = _layout(query, key, value, map_index, scale, backend)
    if found is None:
        return
    made = make(query, key, value, tuple(map_index), checked_scale, out)
    if made is not None:
        if len(_READY) >= _AT_MOST:
            _READY.clear()
        _READY[found[0]] = made


def _layout(
    query: Any, key: Any, value: Any, map_index: Any, scale: Any, backend: Any
) -> tuple[tuple, tuple[int, int, int]] | None:
    """What a ready call is found by, and the tensors' addresses; None for arguments that may need the dispatcher."""
    if not (type(query) is Tensor and type(key) is Tensor and type(value) is Tensor) or not _AVAILABLE:
        return None
    if _function_modes() or _dispatch_modes() or _transform() is not None or _tracing() is not None or _profiled():
        return None
    if forward_ad._current_level >= 0:
        return None
    if (query.requires_grad or key.requires_grad or value.requires_grad) and torch.is_grad_enabled():
        return None
    if query.is_neg() or key.is_neg() or value.is_neg():
        return None
    if not (query.layout is key.layout is value.layout is torch.strided):  # others have no address
        return None
    index = map_index if type(map_index) is tuple else tuple(map_index) if type(map_index) is list else ()
    for entry in index:
        if type(entry) is not int:  # True equals 1, and is no index
            return None
    if not index or type(backend) is not str or type(scale) not in (float, int, type(None)):
        return None
    addresses = query.data_ptr(), key.data_ptr(), value.data_ptr()
    misaligned = (addresses[0] % 16, addresses[1] % 16, addresses[2] % 16)
    return (
        index,
        query.shape,
        key.shape,
        value.shape,
        query.stride(),
        key.stride(),
        value.stride(),
        query.dtype,
        key.dtype,
        value.dtype,
        query.get_device(),
        key.get_device(),
        value.get_device(),
        misaligned,
        scale,
        backend,
    ), addresses
