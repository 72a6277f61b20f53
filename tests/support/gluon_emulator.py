"""Gluon's calls that the kernel for Hopper makes, on a CPU: the kernel's own source runs against them.

Warps of a program are threads of which one runs at a time; which one is drawn at every call that touches a barrier or
is asynchronous, so that a seed is an interleaving. What is asynchronous happens as late as it may, where early mistakes
are punished: a copy when it is drawn, a product when it is waited for, until when what it reads must not change. Shared
memory starts as NaN and is laid out in blocks of a swizzle's width, so that a ring may be read as wider tiles as on the
device.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from fpe_kernels.backends.triton import hopper as launcher


class Fault(AssertionError):
    """What would hang, or read what is not there yet, on the device."""


class Schedule:
    """Threads that take turns, and the copies that are under way."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # Some are fast and some are slow, in any of which a mistake may hide.
        self.speeds = [self.random.choice((1, 10, 100)) for _ in range(8)]
        self.copying = self.random.choice((0.05, 0.3, 0.9))
        self.changed = threading.Condition()
        self.ready: dict[int, Callable[[], bool]] = {}  # of each thread that has not ended: whether it can go on
        self.where: dict[int, str] = {}
        self.running: int | None = None
        self.copies: list[Callable[[], None]] = []
        self.fault: BaseException | None = None

    def run(self, functions: Iterable[Callable[[], None]]) -> None:
        """All of them, to the end.

        Raises:
            Fault: if none can go on, or by one of them.
        """
        threads = []
        for number, function in enumerate(functions):
            self.ready[number] = lambda: True
            threads.append(threading.Thread(target=self._thread, args=(number, function), daemon=True))
        self._next()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while self.copies and self.fault is None:
            self.copies.pop()()
        if self.fault is not None:
            raise self.fault

    def _thread(self, number: int, function: Callable[[], None]) -> None:
        WARPS.number, WARPS.in_flight = number, []
        try:
            self._until_drawn(number)
            function()
            if WARPS.in_flight:
                raise Fault(f"warps {number} end with products in flight")
        except BaseException as problem:
            self.fault = self.fault or problem
        with self.changed:
            self.ready.pop(number, None)
            self._next()
            self.changed.notify_all()

    def switch(self, where: str = "", condition: Callable[[], bool] = lambda: True) -> None:
        """Let others run, until this one is drawn again and ``condition`` holds."""
        number = WARPS.number
        with self.changed:
            self.ready[number], self.where[number] = condition, where
            self._next()
            self.changed.notify_all()
        self._until_drawn(number)

    def _until_drawn(self, number: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.running == number or self.fault is not None)
        if self.fault is not None:
            raise Fault("stopped")

    def _next(self) -> None:
        """Draw who runs; copies are drawn with them."""
        while True:
            able = [number for number, condition in self.ready.items() if condition()]
            if self.copies and (not able or self.random.random() < self.copying):
                self.copies.pop(self.random.randrange(len(self.copies)))()
            elif able:
                (self.running,) = self.random.choices(able, [self.speeds[number] for number in able])
                return
            else:
                self.running = None
                if self.ready and self.fault is None:
                    waiting = "; ".join(f"{number}: {self.where.get(number)}" for number in self.ready)
                    self.fault = Fault(f"deadlock, every warp waits: {waiting}")
                return


WARPS = threading.local()
CURRENT: Schedule = None
PROGRAM = 0
PROGRAMS = 1
LOADS: Counter[tuple] = Counter()


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


def _one(barriers: Barriers) -> Barrier:
    (barrier,) = barriers.listed
    return barrier


def _wait(barriers: Barriers, phase: int, pred: Any = True) -> None:
    barrier = _one(barriers)
    # Whether the phase of this parity, the current one or the one before it, is completed.
    passed = (lambda: barrier.phases % 2 != phase) if pred else (lambda: True)
    CURRENT.switch(f"for phase {phase} of a barrier that has completed {barrier.phases}", passed)


def _arrive(barriers: Barriers) -> None:
    CURRENT.switch()
    _one(barriers).arrive()


def _expect(barriers: Barriers, size: int) -> None:
    CURRENT.switch()
    _one(barriers).arrive(size)


def _init(barriers: Barriers, count: int) -> None:
    barrier = _one(barriers)
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


def _load(descriptor: Descriptor, start: list[Any], barriers: Barriers, tile: Shared) -> None:
    start = [int(place) for place in start]
    LOADS[(descriptor.name, PROGRAM, *start)] += 1
    assert list(descriptor.box) == tile.shape, "a box is as its tile"

    def copy() -> None:
        box = torch.zeros(descriptor.box, dtype=descriptor.tensor.dtype)
        inside = descriptor.tensor[
            tuple(slice(place, place + size) for place, size in zip(start, descriptor.box, strict=True))
        ]
        box[tuple(slice(0, size) for size in inside.shape)] = inside
        tile.write(box.view(descriptor.box[-2:]))
        _one(barriers).arrived(box.numel() * box.element_size())

    CURRENT.copies.append(copy)
    CURRENT.switch()


@dataclass
class Product:
    """In flight until it is waited for."""

    left: Any
    right: Shared
    accumulator: Any
    result: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.issued_with = [_operand(self.left).clone(), _operand(self.right).clone()]

    def complete(self) -> None:
        for operand, before in zip((self.left, self.right), self.issued_with, strict=True):
            if not torch.equal(_operand(operand).view(torch.int16), before.view(torch.int16)):
                raise Fault("shared memory changes while a product reads it")
        left = _operand(self.left)
        product = left.double() @ _operand(self.right).double()
        if self.accumulator is not None:
            product += _value(self.accumulator).double()
        self.result = product.float()


def _operand(operand: Any) -> torch.Tensor:
    return operand.read().contiguous() if isinstance(operand, Shared) else operand.contiguous()


def _value(product: Any) -> torch.Tensor:
    if not isinstance(product, Product):
        return product
    if product.result is None:
        raise Fault("a product is used while it is in flight")
    return product.result


def _multiply(left: Any, right: Shared, accumulator: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async and tuple(accumulator.shape if torch.is_tensor(accumulator) else ()) != (0,)
    product = Product(left, right, accumulator if use_acc else None)
    WARPS.in_flight.append(product)
    CURRENT.switch()
    return product


def _wait_products(left: int, deps: Any) -> Any:
    CURRENT.switch()
    while len(WARPS.in_flight) > left:
        WARPS.in_flight.pop(0).complete()
    values = tuple(_value(product) for product in deps)
    return values[0] if len(values) == 1 else values


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


def _read(pointer: Pointer, mask: Any = None, other: float = 0.0) -> torch.Tensor:
    places, flat = pointer.places, pointer.flat()
    if mask is None:
        return flat[places]
    return torch.where(mask, flat[torch.where(mask, places, 0)], other)


def _store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    places, mask, value = torch.broadcast_tensors(pointer.places, mask, value)
    pointer.flat()[places[mask]] = value[mask]


def _allocate(dtype: torch.dtype, shape: list[int], layout: Layout) -> Shared | Barriers:
    if dtype == torch.int64:
        return Barriers([Barrier() for _ in range(shape[0])])
    return Shared(torch.full((torch.Size(shape).numel(),), float("nan"), dtype=dtype), shape, layout)


def _specialise(parts: list[tuple[Callable[..., None], tuple]], warps: list[int], registers: list[int]) -> None:
    assert len(parts) == len(warps) + 1 == len(registers) + 1
    CURRENT.run([lambda function=function, given=given: function(*given) for function, given in parts])


def _range(*arguments: Any) -> Iterable[torch.Tensor]:
    """What is counted in a kernel is a number of the device's."""
    return (torch.tensor(number) for number in range(*map(int, arguments)))


def _language() -> ModuleType:
    language = ModuleType("triton.experimental.gluon.language")
    same = lambda value, *_: value  # noqa: E731
    language.__dict__.update(
        constexpr=same,
        static_range=range,
        cdiv=lambda a, b: -(-int(a) // b),
        program_id=lambda axis: torch.tensor(PROGRAM),
        num_programs=lambda axis: torch.tensor(PROGRAMS),
        load=_read,
        store=_store,
        allocate_shared_memory=_allocate,
        warp_specialize=_specialise,
        shared_memory_descriptor=Shared,
        NVMMASharedLayout=Layout,
        NVMMADistributedLayout=lambda *_: None,
        SliceLayout=lambda *_: None,
        DotOperandLayout=lambda *_: None,
        arange=lambda start, stop, layout: torch.arange(start, stop),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        convert_layout=same,
        multiple_of=same,
        max_contiguous=same,
        max_constancy=same,
        where=torch.where,
        max=lambda value, axis: value.amax(axis),
        sum=lambda value, axis: value.sum(axis),
        maximum=torch.maximum,
        exp2=torch.exp2,
        log2=torch.log2,
        float32=torch.float32,
        int64=torch.int64,
    )
    return language


def load_kernel(planted: tuple[str, str] | None = None) -> ModuleType:
    """The module of the kernel for Hopper, its source run against what is here.

    Args:
        planted: a text of the kernel's source and what stands in its place.
    """
    gluon, hopper, nvidia = (ModuleType(name) for name in ("gluon", "hopper", "nvidia"))
    gluon.jit, gluon.language = (lambda function: function), _language()
    hopper.fence_async_shared = lambda: None
    hopper.mbarrier = SimpleNamespace(
        wait=_wait, arrive=_arrive, expect=_expect, init=_init, MBarrierLayout=lambda: None
    )
    hopper.tma = SimpleNamespace(async_load=_load)
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = _multiply, _wait_products
    root = "triton.experimental.gluon"
    standing = {
        root: gluon,
        f"{root}.language": gluon.language,
        f"{root}.language.nvidia": nvidia,
        f"{root}.language.nvidia.hopper": hopper,
    }
    experimental = ModuleType("triton.experimental")
    experimental.gluon = gluon
    standing["triton.experimental"] = experimental
    names = [f"{launcher.__package__}.{name}" for name in ("hopper_pieces", "hopper_fetch", "hopper_kernel")]
    before = {name: sys.modules.get(name) for name in (*standing, *names)}
    sys.modules.update(standing)
    count = 0
    try:
        for name in names:
            path = Path(launcher.__file__).parent / f"{name.rsplit('.', 1)[1]}.py"
            module = sys.modules[name] = ModuleType(name)
            module.__package__ = launcher.__package__
            source = path.read_text(encoding="utf-8")
            if planted:
                count += source.count(planted[0])
                source = source.replace(*planted)
            module.range = _range
            exec(compile(source, str(path), "exec"), module.__dict__)
        assert count == (planted is not None), f"{count} times in the source: {planted}"
        return module
    finally:
        for name, was in before.items():
            if was is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = was


def run(launch: Any, seed: int = 0, programs: int | None = None) -> Counter[tuple]:
    """Every program of a launch of :func:`load_kernel`'s kernel; how often each box was fetched by each.

    Args:
        programs: how many run; default: as many as the launch says.

    Raises:
        Fault: if warps wait for ever, or use what is in flight.
    """
    global CURRENT, PROGRAM, PROGRAMS
    LOADS.clear()
    PROGRAMS = launch.programs if programs is None else programs
    for PROGRAM in range(PROGRAMS):
        CURRENT = Schedule(1000 * seed + PROGRAM)
        arguments: dict[str, Any] = {**launch.numbers, **launch.constants}
        for name, tensor in launch.tensors.items():
            if name in launch.boxes:
                box = launch.boxes[name]
                layout = Layout(min(128, box[-1] * tensor.element_size()), 8 * tensor.element_size(), 4)
                arguments[name] = Descriptor(name, tensor, box, layout)
            else:
                arguments[name] = Pointer(tensor)
        launch.kernel(**arguments)
    return LOADS.copy()
