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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import fused_cpu
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
    key_heads: slice | list[int]  # those of the keys, where query heads share them


@dataclass(frozen=True)
class _Block:
    """One block of one map."""

    group: int
    heads: slice
    queries: slice
    keys: slice
    key_heads: slice | list[int]


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cut(length: int, most: int) -> list[slice]:
    """Equal parts of at most ``most``: no part is left so short that its products are slow."""
    size = max(1, -(-length // max(1, -(-length // most))))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def shared_heads(heads: slice, repeats: int) -> slice | list[int]:
    """The heads of keys or values for query ``heads`` of which ``repeats`` share one."""
    return heads if repeats == 1 else [head // repeats for head in range(heads.start, heads.stop)]


def _lengths_of(key: Tensor, key_lengths: tuple[int, ...] | None) -> tuple[int, ...]:
    """The number of keys of every map."""
    return (key.shape[2],) * key.shape[0] if key_lengths is None else key_lengths


def _cut_maps(
    query: Tensor, key: Tensor, by_map: Sequence[tuple[int, ...]], lengths: tuple[int, ...]
) -> Iterator[_Blocks]:
    """Yield the blocks of every map that has batch rows; a map of length 0 has no key blocks."""
    _, heads, queries, _ = query.shape
    itemsize = _working_dtype(query.dtype).itemsize
    repeats = heads // key.shape[1]
    if query.device.type == "cpu":
        # Heads side by side give every thread a product of its own; fewer heads than threads share one product.
        threads = torch.get_num_threads()
        together = min(heads, threads)
        budget = min(threads * _THREAD_BLOCK_BYTES, _DEVICE_BLOCK_BYTES)
    else:
        together, budget = 1, _DEVICE_BLOCK_BYTES
    a_query = _cut(max(lengths), _KEY_BLOCK)[0].stop * itemsize if max(lengths) else itemsize
    together = max(together, min(heads, budget // max(1, queries * a_query)))
    query_blocks = _cut(queries, max(_MIN_QUERY_BLOCK, budget // (together * a_query)))
    for group, rows in enumerate(by_map):
        if rows:
            keys = _cut(lengths[group], _KEY_BLOCK)
            for part in _cut(heads, together):
                yield _Blocks(group, rows, part, query_blocks, keys, shared_heads(part, repeats))


def _pack(tensor: Tensor, rows: tuple[int, ...], heads: slice, repeats: int, dtype: torch.dtype) -> Tensor:
    """[B, H, L, E] -> [heads, L, len(rows)·E]: the columns of all ``rows`` side by side."""
    own = shared_heads(heads, repeats)
    if len(rows) == 1:
        return tensor[rows[0], own].to(dtype)
    return torch.cat([tensor[row, own] for row in rows], dim=-1).to(dtype)


class _Scores:
    """The scores of successive blocks of one map and head range, in units of log 2, in one buffer."""

    def __init__(self, query: Tensor, key: Tensor, bias: Tensor | None, scale: float, blocks: _Blocks) -> None:
        group, heads = blocks.group, blocks.heads
        self.dtype = _working_dtype(query.dtype)
        self.query = query[group, heads]
        self.scale = scale * _LOG2E
        # [heads, D, M]: a view, where nothing has to be widened.
        self.key = key[group, blocks.key_heads].to(self.dtype).transpose(1, 2)
        self.bias = None if bias is None else bias.expand(*query.shape[:3], key.shape[2])[group, heads]
        self.buffer = self.key.new_empty(0)

    def __call__(self, queries: slice, keys: slice) -> Tensor:
        block = self.query[:, queries].to(self.dtype)
        shape = (block.shape[0], block.shape[1], keys.stop - keys.start)
        if self.buffer.numel() < math.prod(shape):
            self.buffer = block.new_empty(math.prod(shape))
        scores = self.buffer[: math.prod(shape)].view(shape)
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
    key_lengths: tuple[int, ...] | None = None,
) -> None:
    """Write ``row_weight ⊙ (A[map_index] @ value)`` to ``out`` and, unless it is known, the log-sum-exp."""
    by_map, lengths = rows_by_map(map_index, query.shape[0]), _lengths_of(key, key_lengths)
    if row_weight is not None and query.device.type == "cpu":
        _weighted_apply(query, key, value, bias, by_map, lengths, scale, out, logsumexp, known, row_weight)
        return
    _apply_maps(query, key, value, bias, by_map, lengths, scale, out, logsumexp, known)
    if row_weight is not None:
        # What a weight selects is not known here without waiting for the device.
        out.mul_(row_weight.unsqueeze(-1))


def _weighted_apply(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    by_map: Sequence[tuple[int, ...]],
    lengths: tuple[int, ...],
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
        _apply_maps(*part, [tuple(range(len(index)))], lengths[own], scale, part_out, statistics, known)
        for position, row in enumerate(index):
            out[row, :, selected] = part_out[position]
        if not known:
            logsumexp[own, :, selected] = statistics
    _apply_maps(query, key, value, bias, whole, lengths, scale, out, logsumexp, known)
    out.mul_(row_weight.unsqueeze(-1))


def _apply_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    by_map: Sequence[tuple[int, ...]],
    lengths: tuple[int, ...],
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
    known: bool,
) -> None:
    """The unweighted product for the batch rows of every map in ``by_map``; other rows stay as they are."""
    columns = value.shape[3]
    by_map = _without_keys(by_map, lengths, out, logsumexp, known)
    if bias is None and not known:
        by_map = fused_cpu.apply(query, key, value, by_map, lengths, scale, out, logsumexp)
    for blocks in _cut_maps(query, key, by_map, lengths):
        scores_of = _Scores(query, key, bias, scale, blocks)
        packed = _pack(value, blocks.rows, blocks.heads, query.shape[1] // value.shape[1], scores_of.dtype)
        for queries in blocks.queries:
            statistics = logsumexp[blocks.group, blocks.heads, queries]
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


def _without_keys(
    by_map: Sequence[tuple[int, ...]], lengths: tuple[int, ...], out: Tensor, logsumexp: Tensor, known: bool
) -> Sequence[tuple[int, ...]]:
    """Write the products of the maps of no keys, which are zero; returns ``by_map`` without their rows."""
    if all(lengths):
        return by_map
    for group, rows in enumerate(by_map):
        if rows and lengths[group] == 0:
            out[list(rows)] = 0.0
            if not known:
                logsumexp[group] = float("-inf")
    return [rows if length else () for rows, length in zip(by_map, lengths, strict=True)]


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
    key_lengths: tuple[int, ...] | None = None,
) -> None:
    """Write ``A[map_index].T @ weight`` to ``out``."""
    columns = weight.shape[3]
    for blocks in _cut_maps(query, key, rows_by_map(map_index, query.shape[0]), _lengths_of(key, key_lengths)):
        scores_of = _Scores(query, key, bias, scale, blocks)
        packed = _pack(weight, blocks.rows, blocks.heads, 1, scores_of.dtype)
        total = packed.new_zeros((packed.shape[0], key.shape[2], packed.shape[2]))
        for queries in blocks.queries:
            statistics = logsumexp[blocks.group, blocks.heads, queries]
            for keys in blocks.keys:
                maps = scores_of.probabilities(queries, keys, statistics)
                total[:, keys].baddbmm_(maps.transpose(1, 2), packed[:, queries])
        for position, row in enumerate(blocks.rows):
            out[row, blocks.heads] = total[..., position * columns : (position + 1) * columns]


def _score_gradients(
    query: Tensor,
    key: Tensor,
    left: Tensor,
    right: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    map_index: tuple[int, ...],
    scale: float,
    lengths: tuple[int, ...],
) -> Iterator[tuple[_Block, Tensor]]:
    """Yield dS for every block, key blocks innermost; the tensor is valid until the next one is asked for."""
    for blocks in _cut_maps(query, key, rows_by_map(map_index, query.shape[0]), lengths):
        scores_of = _Scores(query, key, bias, scale, blocks)
        # Side by side, the product over all columns is the sum over the batch rows.
        lefts = _pack(left, blocks.rows, blocks.heads, 1, scores_of.dtype)
        repeats = query.shape[1] // right.shape[1]
        rights = _pack(right, blocks.rows, blocks.heads, repeats, scores_of.dtype).transpose(1, 2)
        for queries in blocks.queries:
            statistics = logsumexp[blocks.group, blocks.heads, queries]
            offset = delta[blocks.group, blocks.heads, queries].unsqueeze(-1)
            for keys in blocks.keys:
                maps = scores_of.probabilities(queries, keys, statistics)
                outer = torch.bmm(lefts[:, queries], rights[:, :, keys])
                block = _Block(blocks.group, blocks.heads, queries, keys, blocks.key_heads)
                yield block, maps.mul_(outer.sub_(offset))


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
    key_lengths: tuple[int, ...] | None = None,
) -> None:
    """Write the gradients of query and key, the latter [G, H, M, D] with a head for each query head."""
    dtype, lengths = _working_dtype(query.dtype), _lengths_of(key, key_lengths)
    by_query = by_key = key.new_empty(0, dtype=dtype)
    operands = (query, key, left, right, delta, bias, logsumexp, map_index, scale, lengths)
    for block, gradient in _score_gradients(*operands):
        if block.keys.start == 0:
            by_query = gradient.new_zeros((*gradient.shape[:2], query.shape[3]))
            if block.queries.start == 0:
                by_key = gradient.new_zeros((gradient.shape[0], *key.shape[2:]))
        keys = key[block.group, block.key_heads][:, block.keys].to(dtype)
        by_query.baddbmm_(gradient, keys, alpha=scale)
        queries = query[block.group, block.heads, block.queries].to(dtype)
        by_key[:, block.keys].baddbmm_(gradient.transpose(1, 2), queries, alpha=scale)
        if block.keys.stop == lengths[block.group]:
            grad_query[block.group, block.heads, block.queries] = by_query
            if block.queries.stop == query.shape[2]:
                grad_key[block.group, block.heads] = by_key
    for group, rows in enumerate(rows_by_map(map_index, query.shape[0])):
        if not rows or lengths[group] == 0:
            grad_query[group] = 0.0
            grad_key[group] = 0.0


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
    key_lengths: tuple[int, ...] | None = None,
) -> None:
    """Add dS to ``grad``, which has the shape of ``bias``, summed over the axes of size 1."""
    accumulated = torch.zeros_like(grad, dtype=_working_dtype(grad.dtype))
    operands = (query, key, left, right, delta, bias, logsumexp, map_index, scale)
    for block, gradient in _score_gradients(*operands, _lengths_of(key, key_lengths)):
        wanted = (slice(block.group, block.group + 1), block.heads, block.queries, block.keys)
        part = accumulated[
            tuple(index if size > 1 else slice(None) for size, index in zip(bias.shape, wanted, strict=True))
        ]
        part += gradient.unsqueeze(0).sum_to_size(part.shape)
    grad.copy_(accumulated)
