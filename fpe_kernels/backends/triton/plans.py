"""What a call launches, worked out once for tensors of the same layout.

A launch follows from shapes, strides, dtypes and alignments, never from contents, and a short attention takes less time
on a GPU than working it out takes Python. So the compiled kernels of a call are kept with their arguments, in which the
next call of the same layout replaces the addresses of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from ... import ready
from .launch import Launch, allows_tf32, device_of

Plan = Callable[[Any, Any], Iterable[Launch]]
Tensors = tuple[Tensor | None, ...]

_AT_MOST = 4096
_ENDING = re.compile(r"_(ptr|\d+)$")
_AMD = torch.version.hip is not None


@dataclass(frozen=True)
class Step:
    """A launch of a compiled kernel: its arguments in order, and what of them is another tensor's in each call."""

    kernel: Any  # as it is decorated
    launch: Callable[..., None]  # on a stream
    arguments: tuple[Any, ...]
    addresses: tuple[tuple[int, int, int], ...]  # place among the arguments, place among the tensors, bytes from it
    boxes: tuple[tuple[int, int, int], ...]  # place of a descriptor without its tensor, that tensor's, elements from it

    def __call__(self, tensors: Sequence[Tensor | None], addresses: Sequence[int], stream: int) -> None:
        arguments = list(self.arguments)
        for place, source, offset in self.addresses:
            arguments[place] = addresses[source] + offset
        for place, source, offset in self.boxes:
            arguments[place] = _describing(arguments[place], tensors[source], offset)
        self.launch(stream, *arguments)


def _describing(kept: Any, tensor: Tensor | None, offset: int = 0) -> Any:
    """A descriptor like ``kept``, of ``tensor`` from ``offset`` elements on: what it says of the layout was checked
    when the first was made.

    One of its own for each call: threads may be launching the same step, and a kept one would keep its tensor alive.
    """
    made = object.__new__(type(kept))
    made.__dict__.update(kept.__dict__)
    if tensor is not None and offset:
        # Where it starts is all that a launch asks of it.
        tensor = tensor.as_strided((1,), (1,), int(tensor.storage_offset()) + offset)
    made.base = tensor
    return made


_KNOWN: dict[tuple[Hashable, ...], tuple[Step, ...]] = {}


def forget() -> None:
    """Work everything out anew."""
    _KNOWN.clear()
    ready.forget()


def launch_all(plan: Plan, tensors: Tensors, settings: Hashable) -> None:
    """Launch what ``plan(tensors, settings)`` yields, or what it yielded for tensors of the same layout.

    Args:
        plan: yields the launches of a call in order; those depend on nothing but the layouts and ``settings``. A tensor
            of a launch is the field of ``tensors`` by the same name, which may end in ``_ptr`` or in a number, or
            a part of it; tensors by other names are kept.
        tensors: a named tuple of tensors or None; the first of them is never None.
        settings: all else; what is chosen by a function that can be replaced takes that function too.

    Raises:
        RuntimeError: while a CUDA graph is captured, for a layout that has not been launched before.
    """
    query = tensors[0]
    assert query is not None
    key, addresses = _key(plan, tensors, settings)
    steps = _KNOWN.get(key)
    with device_of(query):
        if steps is not None and not any(step.kernel.pre_run_hooks for step in steps):
            # Of no rows nothing is launched, and with the interpreter there is no driver to ask for a stream.
            stream = current_stream() if steps else 0
            for step in steps:
                step(tensors, addresses, stream)
            return
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and nothing of this shape, layout and map_index has run before: "
                "compiling and loading kernels cannot be captured. Make the call once before capturing it, as "
                "torch.cuda.make_graphed_callables and torch.compile(mode='reduce-overhead') do."
            )
        made = [_step(launch, launch.run(), tensors) for launch in plan(tensors, settings)]
    kept = [step for step in made if step is not None]
    if len(kept) == len(made):
        if len(_KNOWN) >= _AT_MOST:
            _KNOWN.clear()
        _KNOWN[key] = tuple(kept)


def known(plan: Plan, tensors: Tensors, settings: Hashable) -> tuple[Step, ...]:
    """What :func:`launch_all` of the same arguments repeats; () where it would work them out anew."""
    return _KNOWN.get(_key(plan, tensors, settings)[0], ())


def _key(plan: Plan, tensors: Tensors, settings: Hashable) -> tuple[tuple[Hashable, ...], list[int]]:
    """What the launches of a call follow from, and the addresses of its tensors."""
    query = tensors[0]
    assert query is not None
    tf32 = query.dtype == torch.float32 and allows_tf32()
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    layouts = [
        None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), address % 16)
        for tensor, address in zip(tensors, addresses)  # noqa: B905  both as long as the tensors
    ]
    compiled_by = compiler_settings()
    if _AMD:
        # Offsets into memory of less than 2 GiB take other instructions there.
        compiled_by += tuple(tensor is None or tensor.untyped_storage().nbytes() < 2**31 for tensor in tensors)
    return (plan, settings, tf32, query.get_device(), compiled_by, *layouts), addresses


def compiler_settings() -> tuple[Any, ...]:
    """Besides layouts, what Triton compiles by."""
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    mode = getattr(compilation, "instrumentation_mode", None)  # Triton 3.4 has neither this nor the following
    return runtime.debug, mode, getattr(runtime, "add_stages_inspection_hook", None)


def current_stream() -> int:
    """The stream of the current device that kernels are launched on."""
    active = driver.active
    stream: int = active.get_current_stream(active.get_current_device())
    return stream


def _launcher(compiled: Any, programs: int) -> Callable[..., None]:
    """``compiled[programs, 1, 1]`` on a stream, less the work that Triton does for hooks while there are none."""
    general, run = compiled[programs, 1, 1], compiled.run
    function, packed = compiled.function, compiled.packed_metadata

    def launch(stream: int, *arguments: Any) -> None:
        if _hooked():
            general(*arguments, stream=stream)
        else:
            run(programs, 1, 1, stream, function, packed, None, None, None, *arguments)

    return launch


def _hooked() -> bool:
    """Whether anybody wants to hear of launches: a profiler of Triton's, say."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):  # a chain of hooks, which may be empty
            return True
    return False


def _step(launch: Launch, compiled: Any, tensors: Tensors) -> Step | None:
    """``launch`` as it is repeated; None where it cannot be, as with the interpreter."""
    if not hasattr(compiled, "packed_metadata"):
        return None
    arguments: list[Any] = []
    addresses, boxes = [], []
    for place, name in enumerate(launch.kernel.arg_names):
        tensor, source = launch.tensors.get(name), _places(type(tensors)).get(_ENDING.sub("", name))
        if name not in launch.tensors:
            arguments.append(launch.numbers[name] if name in launch.numbers else launch.constants[name])
        elif tensor is None or source is None:
            arguments.append(tensor)
        else:
            given = tensors[source]
            assert given is not None
            offset = tensor.data_ptr() - given.data_ptr()
            if name not in launch.boxes:
                addresses.append((place, source, offset))
                arguments.append(None)
            else:
                boxes.append((place, source, offset // tensor.element_size()))
                arguments.append(_describing(launch.argument(name, tensor), None))
    run = _launcher(compiled, launch.programs)
    return Step(launch.kernel, run, tuple(arguments), tuple(addresses), tuple(boxes))


@cache
def _places(record: Any) -> dict[str, int]:
    """Where each field of a named tuple stands."""
    return {name: place for place, name in enumerate(record._fields)}
