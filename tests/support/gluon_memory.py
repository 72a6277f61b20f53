"""Shared memory, barriers, boxes and pointers of an emulated program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from .gluon_schedule import NOW, Fault


@dataclass(frozen=True)
class Layout:
    """How something lies in shared memory; of registers nobody asks."""

    swizzle_byte_width: int = 0
    element_bitwidth: int = 16
    rank: int = 2

    @property
    def columns(self) -> int:
        return 8 * self.swizzle_byte_width // self.element_bitwidth


@dataclass
class Shared:
    """Tiles one behind the other, each in blocks of as many columns as the swizzle is wide."""

    memory: torch.Tensor
    shape: list[int]
    layout: Layout
    reading: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    def index(self, place: Any) -> Shared:
        size = self.memory.numel() // self.shape[0]
        if not 0 <= place < self.shape[0]:
            raise Fault(f"tile {place} of {self.shape[0]}")
        return Shared(self.memory[place * size : (place + 1) * size], self.shape[1:], self.layout)

    def reshape(self, shape: list[int]) -> Shared:
        assert torch.Size(shape).numel() == self.memory.numel() and shape[-1] == self.shape[-1]
        return Shared(self.memory, shape, self.layout)

    def permute(self, axes: tuple[int, int]) -> Shared:
        return Shared(self.memory, self.shape, self.layout, (lambda tile: tile.permute(axes),))

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Layout) -> Shared:
        assert dtype == self.memory.dtype and torch.Size(shape).numel() == self.memory.numel()
        assert layout.columns == self.layout.columns  # or swizzles would differ
        return Shared(self.memory, shape, layout)

    def _blocks(self) -> torch.Tensor:
        rows, columns = self.shape[-2:]
        return self.memory.view(columns // self.layout.columns, rows, self.layout.columns)

    def write(self, tile: torch.Tensor) -> None:
        blocks = self._blocks()
        blocks.copy_(tile.view(blocks.shape[1], blocks.shape[0], blocks.shape[2]).transpose(0, 1))

    def read(self) -> torch.Tensor:
        tile = self._blocks().transpose(0, 1).reshape(self.shape[-2:])
        for change in self.reading:
            tile = change(tile)
        return tile


@dataclass
class Barrier:
    """An mbarrier: phases completed, arrivals and bytes that the current one still wants."""

    count: int = 0
    phases: int = 0
    arrivals: int = 0
    bytes: int = 0

    def arrive(self, expected: int = 0) -> None:
        if not self.count:
            raise Fault("a barrier that was not initialised")
        self.bytes += expected
        self.arrivals -= 1
        if self.arrivals < 0:
            raise Fault("more arrive at a barrier than it counts")
        self._complete()

    def arrived(self, size: int) -> None:
        self.bytes -= size
        self._complete()

    def _complete(self) -> None:
        if self.arrivals == 0 and self.bytes == 0:
            self.phases += 1
            self.arrivals = self.count


@dataclass
class Barriers:
    listed: list[Barrier]

    def index(self, place: int) -> Barriers:
        return Barriers([self.listed[place]])


def one_of(barriers: Barriers) -> Barrier:
    (barrier,) = barriers.listed
    return barrier


def wait(barriers: Barriers, phase: int, pred: Any = True) -> None:
    barrier = one_of(barriers)
    # Whether the phase of this parity, the current one or the one before it, is completed.
    passed = (lambda: barrier.phases % 2 != phase) if pred else (lambda: True)
    NOW.schedule.switch(f"for phase {phase} of a barrier that has completed {barrier.phases}", passed)


def arrive(barriers: Barriers) -> None:
    NOW.schedule.switch()
    one_of(barriers).arrive()


def expect(barriers: Barriers, size: int) -> None:
    NOW.schedule.switch()
    one_of(barriers).arrive(size)


def init(barriers: Barriers, count: int) -> None:
    barrier = one_of(barriers)
    barrier.count = barrier.arrivals = count


@dataclass
class Descriptor:
    """Of a tensor, in boxes."""

    name: str
    tensor: torch.Tensor
    box: tuple[int, ...]
    layout: Layout

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype


def load(descriptor: Descriptor, start: list[Any], barriers: Barriers, tile: Shared) -> None:
    start = [int(place) for place in start]
    NOW.loads[(descriptor.name, NOW.program, *start)] += 1
    assert list(descriptor.box) == tile.shape, "a box is as its tile"

    def copy() -> None:
        box = torch.zeros(descriptor.box, dtype=descriptor.tensor.dtype)
        inside = descriptor.tensor[
            tuple(slice(place, place + size) for place, size in zip(start, descriptor.box, strict=True))
        ]
        box[tuple(slice(0, size) for size in inside.shape)] = inside
        tile.write(box.view(descriptor.box[-2:]))
        one_of(barriers).arrived(box.numel() * box.element_size())

    NOW.schedule.copies.append(copy)
    NOW.schedule.switch()


@dataclass
class Pointer:
    """Into the storage of a tensor, by elements."""

    tensor: torch.Tensor
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.tensor.dtype)

    def __add__(self, elements: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + elements)

    def __sub__(self, elements: Any) -> Pointer:
        return self + -elements

    def flat(self) -> torch.Tensor:
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        return self.tensor.as_strided((size,), (1,), 0)

    @property
    def places(self) -> torch.Tensor:
        return torch.as_tensor(self.offset) + self.tensor.storage_offset()


def read(pointer: Pointer, mask: Any = None, other: float = 0.0) -> torch.Tensor:
    places, flat = pointer.places, pointer.flat()
    if mask is None:
        return flat[places]
    return torch.where(mask, flat[torch.where(mask, places, 0)], other)


def store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    places, mask, value = torch.broadcast_tensors(pointer.places, mask, value)
    pointer.flat()[places[mask]] = value[mask]


def allocate(dtype: torch.dtype, shape: list[int], layout: Layout) -> Shared | Barriers:
    if dtype == torch.int64:
        return Barriers([Barrier() for _ in range(shape[0])])
    return Shared(torch.full((torch.Size(shape).numel(),), float("nan"), dtype=dtype), shape, layout)
