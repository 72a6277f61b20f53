"""The ``torch`` backend: bounded memory on any device, from PyTorch's own matrix products.

Scores exist for one block of queries and keys at a time, small enough to stay in a core's cache between the product
that makes them, the exponential and the product that uses them. The values of all batch rows that share a map stand
side by side, so the scores and the softmax of a block are computed once for all. A map of one row's own, or a small
one, is left on a CPU to PyTorch's fused attention, which gives the log-sum-exp too. Scores are in units of log 2:
PyTorch computes 2ˣ in a third of the time of eˣ. Half-precision inputs are widened block by block: products and
statistics are float32.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import fused_cpu
from .cpu_threads import Task, lane, share_out, threads_compute_alone
from .grouping import rows_by_map

_LOG2E = 1.0 / math.log(2.0)
_LN2 = math.log(2.0)

# Bytes of scores in one block. On a CPU two megabytes a thread stay in the caches, and products of a thousand keys run
# at full speed; a GPU wants a block that fills it, and 64 MiB is still nothing beside the map.
_THREAD_BLOCK_BYTES = 2 << 20
_DEVICE_BLOCK_BYTES = 64 << 20
_KEY_BLOCK = 1024
_MIN_QUERY_BLOCK = 32


@dataclass(frozen=True)
class _Blocks:
    """How one map is cut: some heads at a time, all their query blocks by all their key blocks."""

    group: int
    rows: tuple[int, ...]
    heads: slice
    queries: list[slice]
    keys: list[slice]


@dataclass(frozen=True)
class _Block:
    """One block of one map."""

    group: int
    heads: slice
    queries: slice
    keys: slice


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cut(length: int, most: int) -> list[slice]:
    """Equal parts of at most ``most``: no part is left so short that its products are slow."""
    size = max(1, -(-length // max(1, -(-length // most))))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _cut_maps(query: Tensor, key: Tensor, by_map: Sequence[tuple[int, ...]]) -> Iterator[_Blocks]:
    """Yield the blocks of every map that has batch rows."""
    _, heads, queries, _ = query.shape
    itemsize = _working_dtype(query.dtype).itemsize
    keys = _cut(key.shape[2], _KEY_BLOCK)
    if query.device.type == "cpu":
        # A block is computed by one thread. Where threads cannot be told to, heads side by side give each a product of
        # its own; fewer heads than threads share one product.
        threads = 1 if threads_compute_alone() else torch.get_num_threads()
        together = min(heads, threads)
        budget = min(threads * _THREAD_BLOCK_BYTES, _DEVICE_BLOCK_BYTES)
    else:
        together, budget = 1, _DEVICE_BLOCK_BYTES
    a_query = keys[0].stop * itemsize
    together = max(together, min(heads, budget // max(1, queries * a_query)))
    query_blocks = _cut(queries, max(_MIN_QUERY_BLOCK, budget // (together * a_query)))
    for group, rows in enumerate(by_map):
        if rows:
            for part in _cut(heads, together):
                yield _Blocks(group, rows, part, query_blocks, keys)


def _pack(tensor: Tensor, rows: tuple[int, ...], heads: slice, dtype: torch.dtype) -> Tensor:
    """[B, H, L, E] -> [heads, L, len(rows)·E]: the columns of all ``rows`` side by side."""
    if len(rows) == 1:
        return tensor[rows[0], heads].to(dtype)
    return torch.cat([tensor[row, heads] for row in rows], dim=-1).to(dtype)


class _Buffers:
    """A thread's memory for the scores of its block, kept from block to block of a call."""

    def __init__(self) -> None:
        self._of_lane: dict[int, Tensor] = {}

    def view(self, shape: tuple[int, int, int], like: Tensor) -> Tensor:
        """Uninitialised memory of the calling thread."""
        size, place = math.prod(shape), lane()
        buffer = self._of_lane.get(place)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype:
            buffer = self._of_lane[place] = like.new_empty(size)
        return buffer[:size].view(shape)


class _Scores:
    """The scores of blocks of one map and head range, in units of log 2, in the buffer of the thread that asks."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        scale: float,
        blocks: _Blocks,
        buffers: _Buffers | None = None,
    ) -> None:
        group, heads = blocks.group, blocks.heads
        self.dtype = _working_dtype(query.dtype)
        self.query = query[group, heads]
        self.scale = scale * _LOG2E
        # [heads, D, M]: a view, where nothing has to be widened.
        self.key = key[group, heads].to(self.dtype).transpose(1, 2)
        self.bias = None if bias is None else bias.expand(*query.shape[:3], key.shape[2])[group, heads]
        self.buffers = buffers or _Buffers()

    def __call__(self, queries: slice, keys: slice) -> Tensor:
        block = self.query[:, queries].to(self.dtype)
        shape = (block.shape[0], block.shape[1], keys.stop - keys.start)
        scores = self.buffers.view(shape, block)
        # β = 0 leaves out what the buffer held, even where that is not finite.
        torch.baddbmm(scores, block, self.key[:, :, keys], beta=0, alpha=self.scale, out=scores)
        return scores if self.bias is None else scores.add_(self.bias[:, queries, keys], alpha=_LOG2E)

    def probabilities(self, queries: slice, keys: slice, logsumexp: Tensor) -> Tensor:
        """exp(scores − logsumexp), with rows that are masked throughout at zero."""
        known = logsumexp.masked_fill(logsumexp.isneginf(), 0.0).mul_(_LOG2E)
        return self(queries, keys).sub_(known.unsqueeze(-1)).exp2_()


def apply(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    map_index: tuple[int, ...],
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
    known: bool,
    row_weight: Tensor | None = None,
) -> None:
    """Write ``row_weight ⊙ (A[map_index] @ value)`` to ``out`` and, unless it is known, the log-sum-exp."""
    by_map = rows_by_map(map_index, query.shape[0])
    if row_weight is not None and query.device.type == "cpu":
        _weighted_apply(query, key, value, bias, by_map, scale, out, logsumexp, known, row_weight)
        return
    _apply_maps(query, key, value, bias, by_map, scale, out, logsumexp, known)
    if row_weight is not None:
        # What a weight selects is not known here without waiting for the device.
        out.mul_(row_weight.unsqueeze(-1))


def _weighted_apply(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    by_map: Sequence[tuple[int, ...]],
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
    known: bool,
    row_weight: Tensor,
) -> None:
    """The product of the query rows that have a weight in any batch row of their map, which are gathered for it.

    A region of an image is scattered over the rows, so gathering leaves out all of the rest where blocks would not. A
    row left out is zero, and its log-sum-exp +inf: the statistics of a row without probabilities.
    """
    row_weight = row_weight.expand(out.shape[:3])
    has_weight = (row_weight != 0.0).any(1)
    whole = list(by_map)
    for group, rows in enumerate(by_map):
        if not rows:
            continue
        index = list(rows)
        selected = has_weight[index].any(0).nonzero().squeeze(1)
        if len(selected) == query.shape[2]:
            continue
        whole[group] = ()
        out[index] = 0.0
        own = slice(group, group + 1)
        if not known:
            logsumexp[own] = float("inf")
        if len(selected) == 0:
            continue
        part_bias = bias
        if part_bias is not None:
            # Along the axes where it varies only: a row of key padding is not to become a map.
            part_bias = part_bias if part_bias.shape[0] == 1 else part_bias[own]
            part_bias = part_bias if part_bias.shape[2] == 1 else part_bias[:, :, selected]
        part_out = out.new_empty((len(index), out.shape[1], len(selected), out.shape[3]))
        statistics = logsumexp[own, :, selected]
        part = query[own, :, selected], key[own], value[index], part_bias
        _apply_maps(*part, [tuple(range(len(index)))], scale, part_out, statistics, known)
        for position, row in enumerate(index):
            out[row, :, selected] = part_out[position]
        if not known:
            logsumexp[own, :, selected] = statistics
    _apply_maps(query, key, value, bias, whole, scale, out, logsumexp, known)
    out.mul_(row_weight.unsqueeze(-1))


def _apply_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    by_map: Sequence[tuple[int, ...]],
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
    known: bool,
) -> None:
    """The unweighted product for the batch rows of every map in ``by_map``; other rows stay as they are."""
    if bias is None and not known:
        by_map = fused_cpu.apply(query, key, value, by_map, scale, out, logsumexp)
    tasks: list[Task] = []
    buffers = _Buffers()
    for blocks in _cut_maps(query, key, by_map):
        part = _Part(partial(_operands, query, key, value, bias, scale, blocks, buffers), len(blocks.queries))
        tasks += [
            partial(_product_of_block, part, blocks, queries, out, logsumexp, known) for queries in blocks.queries
        ]
    _compute(tasks, query)


Operands = tuple[_Scores, Tensor]
"""The scores of a map and head range, and the packed columns [heads, L, E of all rows] that they multiply."""


def _operands(
    query: Tensor,
    key: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scale: float,
    blocks: _Blocks,
    buffers: _Buffers,
) -> Operands:
    scores_of = _Scores(query, key, bias, scale, blocks, buffers)
    return scores_of, _pack(packed, blocks.rows, blocks.heads, scores_of.dtype)


class _Part:
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


def _product_of_block(
    part: _Part, blocks: _Blocks, queries: slice, out: Tensor, logsumexp: Tensor, known: bool
) -> None:
    """The product of one block of queries with all keys, written to the rows of its map."""
    with part.held() as (scores_of, packed):
        _write_product(scores_of, packed, blocks, queries, out, logsumexp, known)


def _write_product(
    scores_of: _Scores, packed: Tensor, blocks: _Blocks, queries: slice, out: Tensor, logsumexp: Tensor, known: bool
) -> None:
    statistics = logsumexp[blocks.group, blocks.heads, queries]
    columns = packed.shape[2] // len(blocks.rows)
    if known:
        product, normaliser = _known_product(scores_of, packed, queries, blocks.keys, statistics), None
    else:
        product, normaliser = _online_product(scores_of, packed, queries, blocks.keys, statistics)
    for position, row in enumerate(blocks.rows):
        part = product[..., position * columns : (position + 1) * columns]
        target = out[row, blocks.heads, queries]
        if normaliser is None:
            target.copy_(part)
        elif target.dtype == part.dtype:
            torch.div(part, normaliser, out=target)
        else:
            target.copy_(part / normaliser)


def _compute(tasks: list[Task], query: Tensor) -> None:
    """All tasks of a call: on a CPU by threads that take them as they come free."""
    if query.device.type == "cpu":
        share_out(tasks)
        return
    for task in tasks:
        task()


def _known_product(scores_of: _Scores, packed: Tensor, queries: slice, keys: list[slice], logsumexp: Tensor) -> Tensor:
    product = torch.bmm(scores_of.probabilities(queries, keys[0], logsumexp), packed[:, keys[0]])
    for block in keys[1:]:
        product.baddbmm_(scores_of.probabilities(queries, block, logsumexp), packed[:, block])
    return product


def _online_product(
    scores_of: _Scores, packed: Tensor, queries: slice, keys: list[slice], logsumexp: Tensor
) -> tuple[Tensor, Tensor]:
    """The product over all key blocks by online softmax, and what to divide it by; writes the log-sum-exp.

    ``maximum`` is that of the blocks so far, and both sums are relative to it: where a later block raises it, they
    shrink by as much. It stays finite in rows that have been masked so far, whose sums are zero.
    """
    masked = scores_of.bias is not None
    scores = scores_of(queries, keys[0])
    maximum = scores.amax(-1, keepdim=True)
    if masked:
        maximum.masked_fill_(maximum.isneginf(), torch.finfo(maximum.dtype).min)
    product = torch.bmm(scores.sub_(maximum).exp2_(), packed[:, keys[0]])
    normaliser = scores.sum(-1, keepdim=True)
    for block in keys[1:]:
        scores = scores_of(queries, block)
        raised = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        shrink = maximum.sub_(raised).exp2_()
        scores.sub_(raised).exp2_()
        product.mul_(shrink).baddbmm_(scores, packed[:, block])
        normaliser.mul_(shrink).add_(scores.sum(-1, keepdim=True))
        maximum = raised
    # log 0 = −∞ is the log-sum-exp of a row that is masked throughout.
    logsumexp.copy_(normaliser.log2().add_(maximum).mul_(_LN2).squeeze(-1))
    return product, normaliser.masked_fill_(normaliser == 0.0, 1.0) if masked else normaliser


def adjoint(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    map_index: tuple[int, ...],
    scale: float,
    out: Tensor,
) -> None:
    """Write ``A[map_index].T @ weight`` to ``out``."""
    tasks: list[Task] = []
    buffers = _Buffers()
    for blocks in _cut_maps(query, key, rows_by_map(map_index, query.shape[0])):
        part = _Part(partial(_operands, query, key, weight, bias, scale, blocks, buffers), len(blocks.keys))
        tasks += [partial(_adjoint_of_block, part, blocks, keys, logsumexp, out) for keys in blocks.keys]
    _compute(tasks, query)


def _adjoint_of_block(part: _Part, blocks: _Blocks, keys: slice, logsumexp: Tensor, out: Tensor) -> None:
    """The adjoint product of one block of keys with all queries, written to the rows of its map."""
    with part.held() as (scores_of, packed):
        columns = packed.shape[2] // len(blocks.rows)
        total = packed.new_zeros((packed.shape[0], keys.stop - keys.start, packed.shape[2]))
        for queries in blocks.queries:
            maps = scores_of.probabilities(queries, keys, logsumexp[blocks.group, blocks.heads, queries])
            total.baddbmm_(maps.transpose(1, 2), packed[:, queries])
        for position, row in enumerate(blocks.rows):
            out[row, blocks.heads, keys] = total[..., position * columns : (position + 1) * columns]


def _score_gradients(
    query: Tensor,
    key: Tensor,
    left: Tensor,
    right: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    blocks: _Blocks,
    scale: float,
) -> Iterator[tuple[_Block, Tensor]]:
    """Yield dS for every block, key blocks innermost; the tensor is valid until the next one is asked for."""
    scores_of = _Scores(query, key, bias, scale, blocks)
    # Side by side, the product over all columns is the sum over the batch rows.
    lefts = _pack(left, blocks.rows, blocks.heads, scores_of.dtype)
    rights = _pack(right, blocks.rows, blocks.heads, scores_of.dtype).transpose(1, 2)
    for queries in blocks.queries:
        statistics = logsumexp[blocks.group, blocks.heads, queries]
        offset = delta[blocks.group, blocks.heads, queries].unsqueeze(-1)
        for keys in blocks.keys:
            maps = scores_of.probabilities(queries, keys, statistics)
            outer = torch.bmm(lefts[:, queries], rights[:, :, keys])
            yield _Block(blocks.group, blocks.heads, queries, keys), maps.mul_(outer.sub_(offset))


def score_gradient(
    query: Tensor,
    key: Tensor,
    left: Tensor,
    right: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    map_index: tuple[int, ...],
    scale: float,
    grad_query: Tensor,
    grad_key: Tensor,
) -> None:
    """Write the gradients of query and key."""
    by_map = rows_by_map(map_index, query.shape[0])
    inputs = query, key, left, right, delta, bias, logsumexp
    _compute(
        [
            partial(_gradients_of_part, *inputs, blocks, scale, grad_query, grad_key)
            for blocks in _cut_maps(query, key, by_map)
        ],
        query,
    )
    for group, rows in enumerate(by_map):
        if not rows:
            grad_query[group] = 0.0
            grad_key[group] = 0.0


def _gradients_of_part(
    query: Tensor,
    key: Tensor,
    left: Tensor,
    right: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    blocks: _Blocks,
    scale: float,
    grad_query: Tensor,
    grad_key: Tensor,
) -> None:
    """Write the gradients of query and key of one map and head range."""
    dtype = _working_dtype(query.dtype)
    by_query = by_key = key.new_empty(0, dtype=dtype)
    for block, gradient in _score_gradients(query, key, left, right, delta, bias, logsumexp, blocks, scale):
        if block.keys.start == 0:
            by_query = gradient.new_zeros((*gradient.shape[:2], query.shape[3]))
            if block.queries.start == 0:
                by_key = gradient.new_zeros((gradient.shape[0], *key.shape[2:]))
        by_query.baddbmm_(gradient, key[block.group, block.heads, block.keys].to(dtype), alpha=scale)
        queries = query[block.group, block.heads, block.queries].to(dtype)
        by_key[:, block.keys].baddbmm_(gradient.transpose(1, 2), queries, alpha=scale)
        if block.keys.stop == key.shape[2]:
            grad_query[block.group, block.heads, block.queries] = by_query
            if block.queries.stop == query.shape[2]:
                grad_key[block.group, block.heads] = by_key


def bias_gradient(
    query: Tensor,
    key: Tensor,
    left: Tensor,
    right: Tensor,
    delta: Tensor,
    bias: Tensor,
    logsumexp: Tensor,
    map_index: tuple[int, ...],
    scale: float,
    grad: Tensor,
) -> None:
    """Add dS to ``grad``, which has the shape of ``bias``, summed over the axes of size 1."""
    accumulated = torch.zeros_like(grad, dtype=_working_dtype(grad.dtype))
    # Heads may share the bias, so their blocks follow one another.
    inputs = query, key, left, right, delta, bias, logsumexp
    parts = _cut_maps(query, key, rows_by_map(map_index, query.shape[0]))
    for block, gradient in (found for blocks in parts for found in _score_gradients(*inputs, blocks, scale)):
        wanted = (slice(block.group, block.group + 1), block.heads, block.queries, block.keys)
        part = accumulated[
            tuple(index if size > 1 else slice(None) for size, index in zip(bias.shape, wanted, strict=True))
        ]
        part += gradient.unsqueeze(0).sum_to_size(part.shape)
    grad.copy_(accumulated)
