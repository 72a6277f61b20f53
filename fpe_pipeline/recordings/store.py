"""Where recorded tensors are kept: on a device or in (pinned) memory here, in files by :mod:`.folder_store`.

All tensors of a step lie in one block of memory, or one after the other in one file: a step is moved, and fetched
ahead, by one copy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from .keys import TensorKey, Tensors

__all__ = ["Layout", "MapStore", "MemoryStore", "TensorPlace"]

_ALIGNMENT = 64  # bytes, so that kernels load from a view as they do from a tensor of its own


K = TypeVar("K")


class TensorPlace(NamedTuple):
    """Where a tensor lies in a block of bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def view(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor, without a copy."""
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        return block[self.start : self.start + nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout(Generic[K]):
    """Where tensors lie in a block of bytes, by what names them."""

    tensors: Mapping[K, TensorPlace]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[K, torch.Tensor]) -> Layout[K]:
        places, end = {}, 0
        for name, tensor in tensors.items():
            places[name] = TensorPlace(tensor.dtype, tuple(tensor.shape), end)
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        return cls(places, end)

    def views(self, block: torch.Tensor) -> dict[K, torch.Tensor]:
        """The tensors in a block of bytes, without a copy."""
        return {name: place.view(block) for name, place in self.tensors.items()}


class _Loaded:
    """A step on its way to a device."""

    def __init__(self, block: torch.Tensor, layout: Layout[TensorKey], device: torch.device, stream: Any) -> None:
        self._event = None
        if stream is not None:
            with torch.cuda.stream(stream):
                block = block.to(device, non_blocking=True)
            self._event = stream.record_event()
        self._block = block.to(device)
        self._views = layout.views(self._block)

    def tensors(self) -> Tensors:
        """The tensors, to be used on the current stream."""
        if self._event is not None:
            current = torch.cuda.current_stream(self._block.device)
            current.wait_event(self._event)
            self._block.record_stream(current)
        return self._views


class MapStore(ABC):
    """Tensors by step and key; the step after the one that was read is fetched ahead."""

    def __init__(self) -> None:
        self._begin_reading()

    def _begin_reading(self) -> None:
        self._ahead: tuple[int, torch.device, Future[_Loaded]] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fpe-recording")
        self._streams: dict[torch.device, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle take: all but what fetches steps ahead, which is of this process."""
        return {name: part for name, part in vars(self).items() if name not in ("_ahead", "_worker", "_streams")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin_reading()

    @abstractmethod
    def write(self, step: int, tensors: Tensors) -> None:
        """Keep a step's tensors."""

    @abstractmethod
    def fetch(self, step: int) -> tuple[torch.Tensor, Layout[TensorKey]]:
        """A step's block of bytes, where it is kept, and what lies in it."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all steps."""

    @abstractmethod
    def discard(self) -> None:
        """Remove what was written."""

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Writing in this block leaves nothing if the block fails or is interrupted."""
        try:
            yield
        except BaseException:
            self.discard()
            raise

    def read(self, step: int, device: torch.device) -> Tensors:
        """A step's tensors on ``device``; the next step's are fetched in the background meanwhile."""
        if self._ahead is not None and self._ahead[:2] == (step, device):
            loaded = self._ahead[2].result()
        else:
            loaded = self._load(step, device)
        self._ahead = (step + 1, device, self._worker.submit(self._load, step + 1, device))
        return loaded.tensors()

    def release(self) -> None:
        """Let go of what was fetched ahead."""
        self._ahead = None

    def _load(self, step: int, device: torch.device) -> _Loaded:
        block, layout = self.fetch(step)
        stream = None
        if device.type == "cuda" and block.device.type == "cpu":
            # A stream of its own, so that the copy runs beside the step before.
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream = self._streams[device]
            block = block if block.is_pinned() else block.pin_memory()
        return _Loaded(block, layout, device, stream)


class MemoryStore(MapStore):
    """Steps in the memory of one device; on the CPU beside a GPU, pinned, so that copies overlap with computing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._pinned = device.type == "cpu" and torch.cuda.is_available()
        self._steps: dict[int, tuple[torch.Tensor, Layout[TensorKey]]] = {}
        self._views: dict[int, Tensors] = {}

    def __getstate__(self) -> dict[str, Any]:
        """As of every store; the views are made anew, as a pickle would hold the bytes of each of them once more."""
        return super().__getstate__() | {"_views": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._views = {step: layout.views(block) for step, (block, layout) in self._steps.items()}

    def write(self, step: int, tensors: Tensors) -> None:
        layout = Layout.of(tensors)
        block = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)
        self._steps[step], self._views[step] = (block, layout), layout.views(block)
        for key, kept in self._views[step].items():
            kept.copy_(tensors[key])

    def fetch(self, step: int) -> tuple[torch.Tensor, Layout[TensorKey]]:
        return self._steps.get(step, (torch.empty(0, dtype=torch.uint8), Layout({}, 0)))

    def discard(self) -> None:
        self._steps, self._views = {}, {}

    def read(self, step: int, device: torch.device) -> Tensors:
        if device == self._device:
            return self._views.get(step, {})
        return super().read(step, device)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for views in self._views.values() for tensor in views.values())
