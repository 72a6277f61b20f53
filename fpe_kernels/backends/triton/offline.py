"""Compile a launch for a chip that is not here, and read what the compiler made of it.

Registers, spills and shared memory decide whether a configuration is any good, and all of them are known without a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import hopper
from .launch import Launch

TARGETS = {
    **{f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


@dataclass(frozen=True)
class Resources:
    """What one compiled program takes: registers of a thread, bytes spilled by a thread, bytes of shared memory."""

    registers: int
    spills: int
    shared: int
    matrix_instructions: tuple[str, ...]


def _specialise(launch: Launch) -> ASTSource:
    """The signature that the launcher would compile: ones become constants, multiples of 16 are promised."""
    kernel = launch.kernel
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    promise = [["tt.divisibility", 16]]

    def typed(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(typed(part, (*path, place)) for place, part in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if value is None or value == 1:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = promise
        return "i32" if value < 2**31 else "i64"

    for position, name in enumerate(kernel.arg_names):
        if name in launch.boxes:
            signature[name] = _descriptor_type(launch, name)
        elif (tensor := launch.tensors.get(name)) is not None:
            signature[name] = _TYPES[tensor.dtype]
            attributes[(position,)] = promise
        elif name in launch.constants:
            signature[name] = "constexpr"
            constants[(position,)] = launch.constants[name]
        else:
            signature[name] = typed(launch.numbers.get(name), (position,))
    source: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    return source(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _descriptor_type(launch: Launch, name: str) -> str:
    """A box by its elements and edges, and in Gluon by how it lies in shared memory."""
    tensor, box = launch.tensors[name], list(launch.boxes[name])
    assert tensor is not None
    dtype = tensor.dtype
    lies = f",{hopper.layout(box[-1], dtype.itemsize)!r}" if launch.kernel.is_gluon() else ""
    return f"tensordesc<{_TYPES[dtype].removeprefix('*')}{box}{lies}>"


def compile_for(launch: Launch, target: str) -> Any:
    """``launch`` compiled for ``target``, a key of :data:`TARGETS`, as Triton returns it.

    Raises:
        ValueError: for an unknown target.
        RuntimeError: if the kernels were imported for the interpreter, which compiles nothing.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}; got {target!r}.")
    if not hasattr(launch.kernel, "arg_names") or triton.knobs.runtime.interpret:
        raise RuntimeError("offline compilation needs the kernels without TRITON_INTERPRET=1 in the environment.")
    return triton.compile(_specialise(launch), target=TARGETS[target], options=launch.config.options)


def compile_offline(launch: Launch, target: str) -> Resources:
    """What ``launch`` takes on ``target``; raises what :func:`compile_for` does."""
    return resources(compile_for(launch, target), target)


def resources(compiled: Any, target: str) -> Resources:
    """What a program takes that :func:`compile_for` returned for ``target``."""
    if target.startswith("sm_"):
        registers, spills = _cuda_resources(compiled.asm["cubin"])
        # The mnemonics alone: wgmma.mma_async on Hopper, tcgen05.mma on Blackwell, mma.sync before.
        found = set(re.findall(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", compiled.asm["ptx"]))
    else:
        registers, spills = _amd_resources(compiled.asm["amdgcn"])
        found = set(re.findall(r"(v_mfma_\w+)", compiled.asm["amdgcn"]))
    return Resources(registers, spills, compiled.metadata.shared, tuple(sorted(found)))


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return _figure(r"REG:(\d+)", report), _figure(r"STACK:(\d+)", report) + _figure(r"LOCAL:(\d+)", report)


def _amd_resources(assembly: str) -> tuple[int, int]:
    # A spilled register is four bytes of scratch.
    return _figure(r"\.vgpr_count:\s+(\d+)", assembly), 4 * _figure(r"\.vgpr_spill_count:\s+(\d+)", assembly)


def _figure(pattern: str, report: str) -> int:
    found = re.search(pattern, report)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}:\n{report[:2000]}")
    return int(found.group(1))
