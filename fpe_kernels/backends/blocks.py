"""Blocks of attention maps: how maps are cut, the scores of a block, and who computes which.

A block of scores is small enough to stay in a core's cache between the product that makes it, the exponential and the
product that uses it.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .cpu_threads import Task, lane, share_out, threads_compute_alone, watched
from .protocol import Maps

LOG2E = 1.0 / math.log(2.0)
LN2 = math.log(2.0)

# Bytes of scores in one block. On a CPU two megabytes a thread stay in the caches, and less where several blocks of
# keys add up to something that has to stay there too; a GPU wants a block that fills it, and 64 MiB is still nothing
# beside the map.
THREAD_BLOCK_BYTES = 2 << 20
ADDED_BLOCK_BYTES = 3 << 19
DEVICE_BLOCK_BYTES = 64 << 20
# Up to a thousand keys are one block, which needs no sums of its own; of more, five hundred run at full speed.
WHOLE_KEYS, KEY_BLOCK = 1024, 512
MIN_QUERY_BLOCK = 32
# Bytes of scores from which on a call has a block for every thread. Waking a thread takes as long as computing half of
# them; smaller maps are one block, whose operations PyTorch shares out.
SHARED_OUT_BYTES = 1 << 20
# Bytes of scores that are kept from call to call, in the whole process: fresh memory of a block is mapped page by page,
# which takes a tenth of the time of a small map.
KEPT_BYTES = 32 << 20


@dataclass(frozen=True)
class Blocks:
    """How one map is cut: some heads at a time, all their query blocks by all their key blocks."""

    group: int
    rows: tuple[int, ...]
    heads: slice
    queries: list[slice]
    keys: list[slice]
    key_heads: slice | list[int]  # those of the keys, where query heads share them


@dataclass(frozen=True)
class Block:
    """One block of one map."""

    group: int
    heads: slice
    queries: slice
    keys: slice
    key_heads: slice | list[int]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def cut(length: int, most: int) -> list[slice]:
    """Equal parts of at most ``most``: no part is left so short that its products are slow."""
    size = max(1, -(-length // max(1, -(-length // most))))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def cut_keys(length: int) -> list[slice]:
    """The blocks of so many keys."""
    return cut(length, WHOLE_KEYS if length <= WHOLE_KEYS else KEY_BLOCK)


def shared_heads(heads: slice, repeats: int) -> slice | list[int]:
    """The heads of keys or values for query ``heads`` of which ``repeats`` share one."""
    return heads if repeats == 1 else [head // repeats for head in range(heads.start, heads.stop)]


def lengths_of(key: Tensor, key_lengths: tuple[int, ...] | None) -> tuple[int, ...]:
    """The number of keys of every map."""
    return (key.shape[2],) * key.shape[0] if key_lengths is None else key_lengths


def cut_maps(
    query: Tensor, key: Tensor, by_map: Sequence[tuple[int, ...]], lengths: tuple[int, ...]
) -> Iterator[Blocks]:
    """Yield the blocks of every map that has batch rows; a map of length 0 has no key blocks."""
    _, heads, queries, _ = query.shape
    itemsize = working_dtype(query.dtype).itemsize
    repeats = heads // key.shape[1]
    if query.device.type == "cpu":
        # A block is computed by one thread. Where threads cannot be told to, heads side by side give each a product of
        # its own; fewer heads than threads share one product.
        threads = 1 if threads_compute_alone() else torch.get_num_threads()
        together = min(heads, threads)
        of_thread = THREAD_BLOCK_BYTES if max(lengths) <= WHOLE_KEYS else ADDED_BLOCK_BYTES
        budget = min(threads * of_thread, DEVICE_BLOCK_BYTES)
    else:
        together, budget = 1, DEVICE_BLOCK_BYTES
    a_query = itemsize * max([1, *(block.stop for length in set(lengths) for block in cut_keys(length)[:1])])
    together = max(together, min(heads, budget // max(1, queries * a_query)))
    if query.device.type == "cpu" and threads_compute_alone():
        maps = sum(1 for rows in by_map if rows)
        if maps * heads * queries * a_query >= SHARED_OUT_BYTES:
            together = min(together, max(1, -(-maps * heads // torch.get_num_threads())))
    query_blocks = cut(queries, max(MIN_QUERY_BLOCK, budget // (together * a_query)))
    for group, rows in enumerate(by_map):
        if rows:
            keys = cut_keys(lengths[group])
            for part in cut(heads, together):
                yield Blocks(group, rows, part, query_blocks, keys, shared_heads(part, repeats))


def pack(tensor: Tensor, rows: tuple[int, ...], heads: slice, repeats: int, dtype: torch.dtype) -> Tensor:
    """[B, H, L, E] -> [heads, L, len(rows)·E]: the columns of all ``rows`` side by side."""
    own = shared_heads(heads, repeats)
    if len(rows) == 1:
        return tensor[rows[0], own].to(dtype)
    return torch.cat([tensor[row, own] for row in rows], dim=-1).to(dtype)


class Buffers:
    """Memory for the scores of the blocks of one call, for each of its threads.

    What a call gives back with :meth:`release` the next one takes, whichever thread makes it; a call that comes while
    another one has them makes its own, in a thread that is within a call already too.
    """

    _kept: ClassVar[deque[Tensor]] = deque(maxlen=KEPT_BYTES // THREAD_BLOCK_BYTES)

    def __init__(self) -> None:
        self._of_lane: dict[int, Tensor] = {}

    def view(self, shape: tuple[int, int, int], like: Tensor) -> Tensor:
        """Uninitialised memory of the calling thread, with the dtype and device of ``like``."""
        size, place = shape[0] * shape[1] * shape[2], lane()
        buffer = self._of_lane.get(place)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype:
            buffer = self._of_lane[place] = self._keepable(size, like)
        return buffer.as_strided(shape, (shape[1] * shape[2], shape[2], 1))

    def _keepable(self, size: int, like: Tensor) -> Tensor:
        """A buffer of the kind that is kept, if such a one serves and nobody counts what is allocated."""
        if size > _KEPT_SIZE or like.dtype != torch.float32 or like.device.type != "cpu" or watched():
            return like.new_empty(size)
        try:
            return self._kept.pop()
        except IndexError:
            # A tensor of inference mode could not be written outside of it.
            with torch.inference_mode(False):
                return like.new_empty(_KEPT_SIZE)

    def release(self) -> None:
        """Give back what is kept for other calls; nothing may use a view any longer."""
        if not watched():
            self._kept.extend(
                buffer
                for buffer in self._of_lane.values()
                if buffer.numel() == _KEPT_SIZE and buffer.dtype == torch.float32 and buffer.device.type == "cpu"
            )
        self._of_lane.clear()

    @classmethod
    def forget(cls) -> None:
        """Keep nothing."""
        cls._kept.clear()

    @classmethod
    def kept_bytes(cls) -> int:
        """Bytes that lie ready for the next call."""
        return sum(buffer.numel() * buffer.element_size() for buffer in cls._kept)


_KEPT_SIZE = THREAD_BLOCK_BYTES // torch.float32.itemsize


class Scores:
    """The scores of blocks of one map and head range, in units of log 2, in the buffer of the thread that asks."""

    def __init__(self, maps: Maps, blocks: Blocks, buffers: Buffers | None = None) -> None:
        (query, key, bias), group, heads = maps[:3], blocks.group, blocks.heads
        self.dtype = working_dtype(query.dtype)
        self.query = query[group, heads]
        self.scale = maps.scale * LOG2E
        # [heads, D, M]: a view, where nothing has to be widened.
        self.key = key[group, blocks.key_heads].to(self.dtype).transpose(1, 2)
        self.bias = None if bias is None else bias.expand(*query.shape[:3], key.shape[2])[group, heads]
        self.buffers = buffers or Buffers()

    def __call__(self, queries: slice, keys: slice) -> Tensor:
        block = self.query[:, queries].to(self.dtype)
        shape = (block.shape[0], block.shape[1], keys.stop - keys.start)
        scores = self.buffers.view(shape, block)
        # β = 0 leaves out what the buffer held, even where that is not finite.
        torch.baddbmm(scores, block, self.key[:, :, keys], beta=0, alpha=self.scale, out=scores)
        return scores if self.bias is None else scores.add_(self.bias[:, queries, keys], alpha=LOG2E)

    def probabilities(self, queries: slice, keys: slice, logsumexp: Tensor) -> Tensor:
        """exp(scores − logsumexp), with rows that are masked throughout at zero."""
        known = logsumexp.masked_fill(logsumexp.isneginf(), 0.0).mul_(LOG2E)
        return self(queries, keys).sub_(known.unsqueeze(-1)).exp2_()


Operands = tuple[Scores, Tensor]
"""The scores of a map and head range, and the packed columns [heads, L, E of all rows] that they multiply."""


def operands(maps: Maps, packed: Tensor, blocks: Blocks, buffers: Buffers | None = None) -> Operands:
    """Those of ``blocks``, of a tensor [B, h, L, E] whose columns are to be packed."""
    scores_of = Scores(maps, blocks, buffers)
    repeats = maps.query.shape[1] // packed.shape[1]
    return scores_of, pack(packed, blocks.rows, blocks.heads, repeats, scores_of.dtype)


class Part:
    """What the blocks of one map and head range share: made for the first of them, dropped after the last."""

    def __init__(self, make: Callable[[], Operands], blocks: int) -> None:
        self._make, self._left, self._lock = make, blocks, threading.Lock()
        self._made: Operands | None = None

    @contextmanager
    def held(self) -> Iterator[Operands]:
        """The operands, for one of the blocks."""
        with self._lock:
            self._made = made = self._made or self._make()
        yield made
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._made = None


def compute(tasks: list[Task], query: Tensor) -> None:
    """All tasks of a call: on a CPU by threads that take them as they come free."""
    if query.device.type == "cpu":
        share_out(tasks)
        return
    for task in tasks:
        task()
