"""A forward product whose launches are known, in a straight line: allocate, put addresses in their places, launch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import configs, plans
from .apply_launch import ApplyTensors
from .forward import ApplySettings, plan
from .launch import allows_tf32

_OUT, _LOGSUMEXP = 4, 5  # places among the tensors of a forward plan


def ready_call(
    query: Tensor, key: Tensor, value: Tensor, map_index: tuple[int, ...], scale: float, out: Tensor
) -> ReadyProduct | None:
    """The product ``A[map_index] @ value`` for tensors of the same layout; None where its launches are not kept.

    Args:
        out: what the product gave.
    """
    if torch.version.hip is not None:
        return None  # what is compiled there depends on more than layouts
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
    tensors = ApplyTensors(query, key, value, None, out, logsumexp)
    settings = ApplySettings(map_index, scale, None, False, configs.one_launch, configs.apply_config)
    steps = plans.known(plan, tensors, settings)
    described = {place for step in steps for _, place, _ in step.boxes}
    return None if not steps or _LOGSUMEXP in described else ReadyProduct(query, key, value, out, steps)


class ReadyProduct:
    """A product whose launches are kept, for tensors of one layout.

    Args:
        query, key, value, out: tensors of the layout.
        steps: the launches.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, steps: tuple[plans.Step, ...]) -> None:
        self._size, self._stride = tuple(out.shape), out.stride()
        # The statistics are written, and not read by anyone: as much memory, of whatever dtype.
        self._statistics = query.shape[:3].numel() * torch.float32.itemsize // query.element_size()
        self._steps = steps
        self._hooks = [step.kernel.pre_run_hooks for step in steps]
        self._single_precision = query.dtype == torch.float32
        self._device = query.get_device()
        # A launch is compiled for addresses that are divisible by 16, or for others.
        self._misaligned = query.data_ptr() % 16, key.data_ptr() % 16, value.data_ptr() % 16
        self._state = self._read_state()

    def _read_state(self) -> tuple[object, ...]:
        """What the launches follow from besides layouts."""
        tf32 = self._single_precision and allows_tf32()
        return configs.one_launch, configs.apply_config, tf32, *plans.compiler_settings()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """The product; None where it has to be worked out anew, or launched on another device than the current."""
        addresses = query.data_ptr(), key.data_ptr(), value.data_ptr()
        if self._misaligned != (addresses[0] % 16, addresses[1] % 16, addresses[2] % 16):
            return None
        if self._state != self._read_state() or any(self._hooks):
            return None
        if self._device >= 0 and self._device != torch.cuda.current_device():
            return None
        out = value.new_empty_strided(self._size, self._stride)
        statistics = query.new_empty(self._statistics)
        places = (*addresses, 0, out.data_ptr(), statistics.data_ptr(), 0)
        if (places[_OUT] | places[_LOGSUMEXP]) % 16:
            return None
        stream = plans.current_stream()
        for step in self._steps:
            step((query, key, value, None, out, statistics, None), places, stream)
        return out
