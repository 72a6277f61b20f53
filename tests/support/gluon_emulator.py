"""Gluon's calls that the kernel for Hopper makes, on a CPU: the kernel's own source runs against them.

Warps of a program are threads of which one runs at a time; which one is drawn at every call that touches a barrier or
is asynchronous, so that a seed is an interleaving. What is asynchronous happens as late as it may, where early mistakes
are punished: a copy when it is drawn, a product when it is waited for, until when what it reads must not change. Shared
memory starts as NaN and is laid out in blocks of a swizzle's width, so that a ring may be read as wider tiles as on the
device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from fpe_kernels.backends.triton import hopper as launcher

from .gluon_memory import Descriptor, Layout, Pointer, Shared, allocate, arrive, expect, init, load, read, store, wait
from .gluon_products import multiply, wait_products
from .gluon_schedule import NOW, Schedule


def _specialise(parts: list[tuple[Callable[..., None], tuple]], warps: list[int], registers: list[int]) -> None:
    assert len(parts) == len(warps) + 1 == len(registers) + 1
    NOW.schedule.run([lambda function=function, given=given: function(*given) for function, given in parts])


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
        program_id=lambda axis: torch.tensor(NOW.program),
        num_programs=lambda axis: torch.tensor(NOW.programs),
        load=read,
        store=store,
        allocate_shared_memory=allocate,
        warp_specialize=_specialise,
        shared_memory_descriptor=Shared,
        NVMMASharedLayout=Layout,
        NVMMADistributedLayout=lambda *_: None,
        SliceLayout=lambda *_: None,
        DotOperandLayout=lambda *_: None,
        DistributedLinearLayout=lambda *_: None,
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
    hopper.mbarrier = SimpleNamespace(wait=wait, arrive=arrive, expect=expect, init=init, MBarrierLayout=lambda: None)
    hopper.tma = SimpleNamespace(async_load=load)
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = multiply, wait_products
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
    NOW.loads.clear()
    NOW.programs = launch.programs if programs is None else programs
    for program in range(NOW.programs):
        NOW.program = program
        NOW.schedule = Schedule(1000 * seed + program)
        arguments: dict[str, Any] = {**launch.numbers, **launch.constants}
        for name, tensor in launch.tensors.items():
            if name in launch.boxes:
                box = launch.boxes[name]
                layout = Layout(min(128, box[-1] * tensor.element_size()), 8 * tensor.element_size(), 4)
                arguments[name] = Descriptor(name, tensor, box, layout)
            else:
                arguments[name] = Pointer(tensor)
        launch.kernel(**arguments)
    return NOW.loads.copy()
