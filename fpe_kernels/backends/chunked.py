"""The ``torch`` backend: bounded memory on any device, from PyTorch's own matrix products.

Scores exist for one block at a time, small enough to stay in a core's cache while they are exponentiated. The values of
all batch rows that share a map stand side by side, so the scores and the softmax of a block are computed once for all.
Half-precision inputs are widened block by block: products and statistics are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .grouping import rows_by_map

# Bytes of scores in one block. On a CPU two megabytes stay in the last private cache of two cores; a GPU wants a block
# that fills it, and 64 MiB is still nothing beside the map.
_BLOCK_BYTES = {"cpu": 2 << 20}
_DEVICE_BLOCK_BYTES = 64 << 20
_MIN_QUERY_BLOCK = 32


@dataclass(frozen=True)
class _Block:
    """A range of query rows of a range of heads of one map."""

    group: int
    rows: tuple[int, ...]
    heads: slice
    queries: slice


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _block_sizes(heads: int, queries: int, keys: int, itemsize: int, device: str) -> tuple[int, int]:
    """How many heads and query rows make a block: whole heads while they fit, then parts of one."""
    budget = _BLOCK_BYTES.get(device, _DEVICE_BLOCK_BYTES) // (keys * itemsize)
    if budget >= queries:
        return max(1, min(heads, budget // queries)), queries
    return 1, min(queries, max(_MIN_QUERY_BLOCK, budget))


def _head_blocks(
    query: Tensor, key: Tensor, map_index: tuple[int, ...]
) -> Iterator[tuple[int, tuple[int, ...], slice, list[slice]]]:
    """Yield (map, its batch rows, heads, query blocks) for every map that some batch row names."""
    maps, heads, queries, _ = query.shape
    itemsize = _working_dtype(query.dtype).itemsize
    head_block, query_block = _block_sizes(heads, queries, key.shape[2], itemsize, query.device.type)
    blocks = [slice(start, min(start + query_block, queries)) for start in range(0, queries, query_block)]
    for group, rows in enumerate(rows_by_map(map_index, maps)):
        if rows:
            for start in range(0, heads, head_block):
                yield group, rows, slice(start, min(start + head_block, heads)), blocks


def _pack(tensor: Tensor, rows: tuple[int, ...], heads: slice, dtype: torch.dtype) -> Tensor:
    """[B, H, L, E] -> [heads, L, len(rows)·E]: the columns of all ``rows`` side by side."""
    if len(rows) == 1:
        return tensor[rows[0], heads].to(dtype)
    return torch.cat([tensor[row, heads] for row in rows], dim=-1).to(dtype)


class _Scores:
    """The scores of successive query blocks of one map and head range, in one buffer."""

    def __init__(self, query: Tensor, key: Tensor, bias: Tensor | None, scale: float, group: int, heads: slice) -> None:
        self.dtype = _working_dtype(query.dtype)
        self.query = query[group, heads]
        self.scale = scale
        # [heads, D, M], copied once so that every block's product reads it in order.
        self.key = key[group, heads].to(self.dtype).transpose(1, 2)
        self.bias = None if bias is None else bias.expand(*query.shape[:3], key.shape[2])[group, heads]
        self.buffer: Tensor | None = None

    def __call__(self, queries: slice) -> Tensor:
        block = self.query[:, queries].to(self.dtype) * self.scale
        shape = (block.shape[0], block.shape[1], self.key.shape[2])
        if self.buffer is None or self.buffer.shape != shape:
            self.buffer = block.new_empty(shape)
        scores = torch.bmm(block, self.key, out=self.buffer)
        return scores if self.bias is None else scores.add_(self.bias[:, queries])

    def probabilities(self, queries: slice, logsumexp: Tensor) -> Tensor:
        """exp(scores − logsumexp), with rows that are masked throughout at zero."""
        finite = logsumexp.masked_fill(logsumexp.isneginf(), 0.0)
        return self(queries).sub_(finite.unsqueeze(-1)).exp_()


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
) -> None:
    """Write ``A[map_index] @ value`` to ``out`` and, unless it is known, the log-sum-exp."""
    columns = value.shape[3]
    for group, rows, heads, blocks in _head_blocks(query, key, map_index):
        scores_of = _Scores(query, key, bias, scale, group, heads)
        packed = _pack(value, rows, heads, scores_of.dtype)
        for queries in blocks:
            statistics = logsumexp[group, heads, queries]
            if known:
                product = torch.bmm(scores_of.probabilities(queries, statistics), packed)
            else:
                scores = scores_of(queries)
                maximum = scores.amax(-1, keepdim=True)
                maximum.masked_fill_(maximum.isneginf(), 0.0)
                normaliser = scores.sub_(maximum).exp_().sum(-1, keepdim=True)
                statistics.copy_((maximum + normaliser.log()).squeeze(-1))
                product = torch.bmm(scores, packed)
                product.div_(normaliser.masked_fill_(normaliser == 0.0, 1.0))
            for position, row in enumerate(rows):
                out[row, heads, queries] = product[..., position * columns : (position + 1) * columns]


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
    columns = weight.shape[3]
    for group, rows, heads, blocks in _head_blocks(query, key, map_index):
        scores_of = _Scores(query, key, bias, scale, group, heads)
        packed = _pack(weight, rows, heads, scores_of.dtype)
        total = packed.new_zeros((packed.shape[0], key.shape[2], packed.shape[2]))
        for queries in blocks:
            maps = scores_of.probabilities(queries, logsumexp[group, heads, queries])
            total.baddbmm_(maps.transpose(1, 2), packed[:, queries])
        for position, row in enumerate(rows):
            out[row, heads] = total[..., position * columns : (position + 1) * columns]


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
) -> Iterator[tuple[_Block, Tensor]]:
    """Yield dS for every block; the tensor is valid until the next one is asked for."""
    for group, rows, heads, blocks in _head_blocks(query, key, map_index):
        scores_of = _Scores(query, key, bias, scale, group, heads)
        # Side by side, the product over all columns is the sum over the batch rows.
        lefts = _pack(left, rows, heads, scores_of.dtype)
        rights = _pack(right, rows, heads, scores_of.dtype).transpose(1, 2)
        for queries in blocks:
            maps = scores_of.probabilities(queries, logsumexp[group, heads, queries])
            outer = torch.bmm(lefts[:, queries], rights)
            gradient = maps.mul_(outer.sub_(delta[group, heads, queries].unsqueeze(-1)))
            yield _Block(group, rows, heads, queries), gradient


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
    dtype = _working_dtype(query.dtype)
    total = key.new_empty(0, dtype=dtype)
    for block, gradient in _score_gradients(query, key, left, right, delta, bias, logsumexp, map_index, scale):
        if block.queries.start == 0:
            total = gradient.new_zeros((gradient.shape[0], *key.shape[2:]))
        keys = key[block.group, block.heads].to(dtype)
        queries = query[block.group, block.heads, block.queries].to(dtype)
        grad_query[block.group, block.heads, block.queries] = torch.bmm(gradient, keys).mul_(scale)
        total.baddbmm_(gradient.transpose(1, 2), queries, alpha=scale)
        if block.queries.stop == query.shape[2]:
            grad_key[block.group, block.heads] = total
    for group, rows in enumerate(rows_by_map(map_index, query.shape[0])):
        if not rows:
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
) -> None:
    """Add dS to ``grad``, which has the shape of ``bias``, summed over the axes of size 1."""
    accumulated = torch.zeros_like(grad, dtype=_working_dtype(grad.dtype))
    for block, gradient in _score_gradients(query, key, left, right, delta, bias, logsumexp, map_index, scale):
        wanted = (slice(block.group, block.group + 1), block.heads, block.queries, slice(None))
        part = accumulated[
            tuple(index if size > 1 else slice(None) for size, index in zip(bias.shape, wanted, strict=True))
        ]
        part += gradient.unsqueeze(0).sum_to_size(part.shape)
    grad.copy_(accumulated)
