"""Blocks that have all keys of a map, on a CPU: PyTorch's softmax makes the map, and nothing is packed or divided.

Which parts of the tensors such a block reads and writes follows from their layouts, so it is worked out once for a call
that is kept ready. A small map takes as long as the calls that compute it: every view is one call here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import fused_cpu
from .blocks import LN2, LOG2E, Blocks, Buffers, cut_maps, lengths_of, working_dtype
from .bounded import bounded
from .cpu_threads import share_out
from .grouping import rows_by_map

# In a small map every name that is looked up counts, and so does a name of a device that is parsed.
_thread_count = torch.get_num_threads
_autocast_enabled: Callable[[], bool] = getattr(
    torch._C, "_is_any_autocast_enabled", partial(torch.is_autocast_enabled, "cpu")
)


class View(NamedTuple):
    """Where a part of a tensor lies: one call, where slices of several axes are as many."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, part: Tensor, tensor: Tensor) -> View:
        """That of ``part``, a view of ``tensor``."""
        return cls(tuple(part.shape), part.stride(), int(part.storage_offset()) - int(tensor.storage_offset()))

    def __call__(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that has the layout of the one before."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


class WholeBlock(NamedTuple):
    """Some heads and queries of a map with all of its keys, and the batch rows that name it."""

    query: View
    key: View  # [heads, D, M]
    rows: tuple[tuple[View, View], ...]  # of values and of the output
    where: tuple[int, slice, slice]  # among the log-sum-exp
    scores: tuple[int, int, int]

    def write(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        in_range: bool,
        out: Tensor,
        logsumexp: Tensor | None,
        buffers: Buffers,
    ) -> None:
        """Write the products, and the log-sum-exp where that is wanted.

        Args:
            in_range: whether exponentials of the scores need no shift (`bounded`).
        """
        scores = buffers.view(self.scores, query)
        factor = scale * LOG2E if in_range else scale
        # β = 0 leaves out what the buffer held, even where that is not finite.
        torch.baddbmm(scores, self.query(query), self.key(key), beta=0, alpha=factor, out=scores)
        if in_range:
            sums = scores.exp2_().sum(-1, keepdim=True)
            if logsumexp is not None:
                logsumexp[self.where] = sums.log2().mul_(LN2).squeeze(-1)
            for own, target in self.rows:
                part = target(out)
                torch.bmm(scores, own(value), out=part)
                part.div_(sums)
            return
        maximum = None if logsumexp is None else scores.amax(-1)
        torch.softmax(scores, -1, out=scores)
        if logsumexp is not None and maximum is not None:
            # The largest score's probability is one over the sum of the exponentials that are relative to it.
            logsumexp[self.where] = maximum.sub_(scores.amax(-1).log_())
        for own, target in self.rows:
            torch.bmm(scores, own(value), out=target(out))


def serves(blocks: Blocks, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> bool:
    """Whether a block has all keys, and parts of the tensors are operands as they are: no heads or digits to add."""
    return (
        len(blocks.keys) == 1
        and query.device.type == "cpu"
        and query.dtype == value.dtype == out.dtype == working_dtype(query.dtype)
        and query.shape[1] == key.shape[1] == value.shape[1]
    )


def whole_blocks(blocks: Blocks, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> list[WholeBlock]:
    """One for each block of queries of ``blocks``, which have one block of keys."""
    (keys,) = blocks.keys
    group, heads = blocks.group, blocks.heads
    transposed = View.of(key[group, heads, keys].transpose(1, 2), key)
    found = []
    for queries in blocks.queries:
        part = query[group, heads, queries]
        rows = tuple(
            (View.of(value[row, heads, keys], value), View.of(out[row, heads, queries], out)) for row in blocks.rows
        )
        where = group, heads, queries
        shape = part.shape[0], part.shape[1], keys.stop - keys.start
        found.append(WholeBlock(View.of(part, query), transposed, rows, where, shape))
    return found


def ready_call(
    query: Tensor, key: Tensor, value: Tensor, map_index: tuple[int, ...], scale: float, out: Tensor
) -> ReadyProduct | None:
    """The product ``A[map_index] @ value`` for tensors of the same layout; None where other blocks have a part in it.

    Those take many times longer than what a ready call saves.

    Args:
        out: what the product gave.
    """
    if not query.is_cpu or key.shape[2] == 0:
        return None
    lengths = lengths_of(key, None)
    runs, left = fused_cpu.runs(query, key, value, rows_by_map(map_index, query.shape[0]), lengths)
    cut = list(cut_maps(query, key, left, lengths))
    if not all(serves(blocks, query, key, value, out) for blocks in cut):
        return None
    whole = [block for blocks in cut for block in whole_blocks(blocks, query, key, value, out)]
    maps = {blocks.group: blocks.rows for blocks in cut}
    return ReadyProduct(scale, out, runs, whole, maps)


class ReadyProduct:
    """A product whose calls and blocks are known, for tensors of one layout.

    Args:
        scale: factor of the scores.
        out: a result of the layout.
        runs, blocks: what computes it.
        maps: the rows of those maps that the blocks are of.
    """

    def __init__(
        self,
        scale: float,
        out: Tensor,
        runs: Sequence[fused_cpu.Run],
        blocks: Sequence[WholeBlock],
        maps: Mapping[int, Sequence[int]],
    ) -> None:
        self._scale, self._size, self._stride = scale, tuple(out.shape), out.stride()
        self._runs, self._blocks, self._maps, self._threads = runs, blocks, maps, torch.get_num_threads()
        self._everything = len(runs) == 1 and runs[0].everything

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """The product; None for another number of threads, and under autocast, which has to be put aside."""
        if _autocast_enabled() or self._threads != _thread_count():
            return None
        if self._everything:
            product = fused_cpu.whole_product(query, key, value, self._scale)
            # In memory it is [rows, N, heads, D] where the operands are.
            return product if product.stride() == self._stride else self._empty(value).copy_(product)
        out = self._empty(value)
        in_range = {
            group: bounded(query, key, value, self._scale, group, rows, key.shape[2])
            for group, rows in self._maps.items()
        }
        for run in self._runs:
            fused_cpu.write_product(run, query, key, value, self._scale, out, None)
        buffers = Buffers()
        if len(self._blocks) == 1:
            (block,) = self._blocks
            block.write(query, key, value, self._scale, in_range[block.where[0]], out, None, buffers)
        else:
            share_out(
                [
                    partial(block.write, query, key, value, self._scale, in_range[block.where[0]], out, None, buffers)
                    for block in self._blocks
                ]
            )
        buffers.release()
        return out

    def _empty(self, value: Tensor) -> Tensor:
        return value.new_empty_strided(self._size, self._stride)
