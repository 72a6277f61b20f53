"""Forward on Hopper through :mod:`.hopper_kernel`: what it serves, with reasons where it does not, and its launches.

What :mod:`.apply` computes without bias and weights, with the log-sum-exp known or not. No rule of :mod:`.configs`
chooses this kernel; the tuner times it, and its table may.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from .chips import MULTIPROCESSORS, SHARED_MEMORY
from .configs import Config
from .launch import Launch, folds
from .packing import Chunk, device_table, split_width
from .primitives import LOG2E

ROWS = 64  # of a matrix instruction of a warpgroup
TILE_ROWS = (64, 128, 192, 256)  # of a program
WARPS = 4  # of a warpgroup
REGISTERS = {1: 240, 2: 240, 3: 160}
"""Of a thread that multiplies, by warpgroups that do: beside the threads that fetch they fill the register file."""

LEAST_HELD, MOST_HELD = 32, 56
"""Registers of a thread for what is counted nowhere: addresses, statistics, operands on their way. The assembler of
Triton 3.6 to 3.8 needs the less, that of 3.9 the more: given fewer it spills, and waits for every product."""

_HELD = MOST_HELD if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else LEAST_HELD


def warpgroups(block_m: int) -> tuple[int, int]:
    """Warpgroups that multiply in a program of ``block_m`` rows, and the rows of each.

    Four times 64 rows are two warpgroups with two matrix instructions each for one tile of keys: the register file
    holds no third warpgroup of 240 registers, and what a program reads from the cache for a row is halved.
    """
    rows = ROWS if block_m < 4 * ROWS else 2 * ROWS
    return block_m // rows, rows


@cache
def kernels() -> ModuleType | str:
    """:mod:`.hopper_kernel`, or why this Triton does not have what it is written in."""
    try:
        from . import hopper_kernel
    except (ImportError, AttributeError) as error:
        return f"Triton {triton.__version__} has no Gluon for Hopper ({error})"
    return hopper_kernel


def missing(device: torch.device) -> str:
    """Why a chip that the kernel is made for goes without it, or nothing; other kernels serve there."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return ""
    found = kernels()
    return f"without the kernel for Hopper: {found}" if isinstance(found, str) else ""


def refusal(query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, scale: float, config: Config) -> str:
    """Why no launch of ``chunk`` can be made so, or nothing; ``value`` is narrowed to its columns."""
    if triton.knobs.runtime.interpret:
        return "the interpreter runs no Gluon"
    if isinstance(found := kernels(), str):
        return found
    if query.is_cuda and torch.cuda.get_device_capability(query.device) != (9, 0):
        return "the matrix instructions of warpgroups are those of compute capability 9.0"
    if query.element_size() != 2:
        return f"tiles are float16 or bfloat16, the tensors {query.dtype}"
    if not folds(scale):
        return f"the scale must be positive, it is {scale:g}" + (", too small for float32" if scale > 0.0 else "")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if reason := _no_descriptor(tensor):
            return f"no descriptor holds the {name}: {reason}"
    if config.block_m not in TILE_ROWS or config.warps != WARPS:
        return f"tiles have 64, 128, 192 or 256 rows, and {WARPS} warps are counted; asked for {config}"
    if config.block_n not in (16, 32, 64, 128, 256):
        return f"tiles of keys have 16, 32, 64, 128 or 256 rows, not {config.block_n}"
    if config.stages < 2:
        # The keys after next are waited for before a slot of values is given back.
        return f"rings have two slots or more, not {config.stages}"
    shape = query.shape[3], value.shape[3]
    if most_branches(*shape, fitted(*shape, 1, config)) < 1:
        return f"the tiles of {config} do not fit"
    return ""


def _no_descriptor(tensor: Tensor) -> str:
    """What the copy engine asks of memory and ``tensor`` does not have."""
    if tensor.numel() == 0:
        return "it is empty"
    if tensor.stride(3) != 1:
        return f"neighbours in the last axis are {tensor.stride(3)} elements apart, not 1"
    if tensor.data_ptr() % 16:
        return "it does not start at a multiple of 16 bytes"
    steps = [stride * tensor.element_size() for stride in tensor.stride()[:3]]
    if any(step <= 0 or step % 16 for step in steps):
        return f"its strides are {steps} bytes, not positive multiples of 16"
    return ""


def most_branches(head_dim: int, value_dim: int, config: Config, held: int = _HELD) -> int:
    """How many branches one launch holds, by registers and by shared memory; 0 where not even one fits."""
    head, packed = sum(split_width(head_dim)), sum(split_width(value_dim))
    groups, rows = warpgroups(config.block_m)
    # A thread holds rows / 128 of a tile's float32 columns, and the probabilities a second time in half precision.
    by_registers = ((REGISTERS[groups] - held) * 128 // rows - 3 * config.block_n // 2) // packed
    free = SHARED_MEMORY["sm_90"] - 1024 - 2 * head * (config.block_m + config.stages * config.block_n)
    by_shared = free // (2 * config.stages * config.block_n * packed)
    return max(0, min(by_registers, by_shared, 4))


def fitted(head_dim: int, value_dim: int, branches: int, config: Config, held: int = _HELD) -> Config:
    """``config``, or smaller tiles where this Triton holds fewer branches of them than that which they are tuned with.

    Args:
        held: as of :data:`LEAST_HELD` or :data:`MOST_HELD`.
    """
    wanted = min(branches, most_branches(head_dim, value_dim, config, LEAST_HELD))
    if held > LEAST_HELD and head_dim > 128:  # the addresses of a long product's steps take registers too
        config = replace(config, block_n=min(config.block_n, 64))
    while most_branches(head_dim, value_dim, config, held) < wanted and config.block_n > 32:
        config = replace(config, block_n=config.block_n // 2)
    if most_branches(head_dim, value_dim, config, held) < wanted and config.block_m > 128:
        config = replace(config, block_m=128)
    return config


def launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk: Chunk,
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
    known: bool,
    config: Config,
) -> Iterator[Launch]:
    """The launches of a chunk that is not refused; ``value`` and ``out`` are narrowed to its columns.

    More branches than one launch holds are dealt out to several, of which the later know the log-sum-exp.
    """
    config = fitted(query.shape[3], value.shape[3], chunk.branches, config)
    parts = -(-chunk.branches // most_branches(query.shape[3], value.shape[3], config))
    share, extra = divmod(chunk.branches, parts)
    start = 1
    for part in range(parts):
        stop = start + share + (part < extra)
        piece = replace(chunk, table=tuple((entry[0], *entry[start:stop]) for entry in chunk.table))
        yield prepare(query, key, value, piece, scale, out, logsumexp, known or part > 0, config)
        start = stop


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk: Chunk,
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
    known: bool,
    config: Config,
) -> Launch:
    """One launch; ``value`` and ``out`` are narrowed to the columns of ``chunk``."""
    _, heads, queries, head_dim = query.shape
    keys, value_dim = key.shape[2], value.shape[3]
    tensors: dict[str, Tensor] = {}
    boxes: dict[str, tuple[int, ...]] = {}
    absent: dict[str, None] = {}
    groups, group_rows = warpgroups(config.block_m)
    for name, tensor, rows in (
        ("query", query, group_rows),
        ("key", key, config.block_n),
        ("value", value, config.block_n),
    ):
        for piece, width in enumerate(split_width(tensor.shape[3])):
            if width:
                tensors[f"{name}_{piece}"], boxes[f"{name}_{piece}"] = tensor, (1, 1, rows, width)
            else:
                absent[f"{name}_{piece}"] = None
    tiles = -(-queries // config.block_m) * heads * len(chunk.table)
    (head_0, head_1), (value_0, value_1) = split_width(head_dim), split_width(value_dim)
    module = kernels()
    assert isinstance(module, ModuleType), module
    return Launch(
        module.hopper_kernel,
        programs=tiles if config.single else min(tiles, resident(query.device, config)),
        config=config,
        tensors={
            **tensors,
            "out_ptr": out,
            "logsumexp_ptr": logsumexp,
            "table_ptr": device_table(chunk.table, query.device),
        },
        boxes=boxes,
        descriptor=descriptor,
        numbers={
            "scale": scale * LOG2E.value,
            "programs": tiles,
            "heads": heads,
            "queries": queries,
            "keys": keys,
            "out_strides": out.stride(),
        },
        constants={
            **absent,
            "HEAD_0": head_0,
            "HEAD_1": head_1,
            "VALUE_DIM": value_dim,
            "VALUE_0": value_0,
            "VALUE_1": value_1,
            "BRANCHES": chunk.branches,
            "BUNDLE": bundle(chunk.branches, max(value_0, value_1)),
            "OUT_VECTOR": 2 if _pairs(out) else 1,
            "KNOWN": known,
            "EVEN_KEYS": keys % config.block_n == 0,
            "GROUPS": groups,
            "ROWS": group_rows,
            "TURNS": config.specialised and groups > 1,
            "BLOCK_N": config.block_n,
            "STAGES": config.stages,
            "REGISTERS": REGISTERS[groups],
        },
    )


def resident(device: torch.device, config: Config) -> int:
    """How many programs run at the same time: one a multiprocessor by its registers, or two of one warpgroup."""
    on_device = device.type == "cuda" and not torch.version.hip
    every = torch.cuda.get_device_properties(device).multi_processor_count if on_device else MULTIPROCESSORS["sm_90"]
    return every * (2 if config.block_m == ROWS else 1)


def bundle(branches: int, width: int) -> int:
    """How many branches share one product: a power of two of at most 256 columns, the widest matrix instruction."""
    return max(count for count in (1, 2, 4) if branches % count == 0 and (count == 1 or count * width <= 256))


def _pairs(out: Tensor) -> bool:
    """Whether two neighbours of a row, which a thread holds, can be written at once."""
    even = all(stride % 2 == 0 for stride in out.stride()[:3])
    return even and out.stride(3) == 1 and out.shape[3] % 2 == 0 and out.data_ptr() % (2 * out.element_size()) == 0


@cache
def layout(width: int, itemsize: int) -> Any:
    """How a box with rows of ``width`` lies in shared memory: as the matrix instructions read it without conflicts."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=min(128, width * itemsize), element_bitwidth=8 * itemsize, rank=4)


def descriptor(tensor: Tensor, shape: list[int], steps: list[int], box: list[int]) -> Any:
    """Of ``tensor``, in boxes."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(tensor, shape, steps, box, layout(box[-1], tensor.element_size()))
