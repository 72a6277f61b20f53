"""Gradients of the ``torch`` backend, block by block: dS = A ∘ (Σ left rightᵀ − delta)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .blocks import Block, Blocks, compute, cut_maps, lengths_of, operands, pack, working_dtype
from .grouping import rows_by_map
from .protocol import Factors, Maps


def _cut(maps: Maps) -> Iterator[Blocks]:
    by_map = rows_by_map(maps.map_index, maps.query.shape[0])
    return cut_maps(maps.query, maps.key, by_map, lengths_of(maps.key, maps.key_lengths))


def _score_gradients(maps: Maps, factors: Factors, blocks: Blocks) -> Iterator[tuple[Block, Tensor]]:
    """Yield dS for every block, key blocks innermost; the tensor is valid until the next one is asked for."""
    # Side by side, the product over all columns is the sum over the batch rows.
    scores_of, rights = operands(maps, factors.right, blocks)
    rights = rights.transpose(1, 2)
    lefts = pack(factors.left, blocks.rows, blocks.heads, 1, scores_of.dtype)
    for queries in blocks.queries:
        statistics = factors.logsumexp[blocks.group, blocks.heads, queries]
        offset = factors.delta[blocks.group, blocks.heads, queries].unsqueeze(-1)
        for keys in blocks.keys:
            probabilities = scores_of.probabilities(queries, keys, statistics)
            outer = torch.bmm(lefts[:, queries], rights[:, :, keys])
            block = Block(blocks.group, blocks.heads, queries, keys, blocks.key_heads)
            yield block, probabilities.mul_(outer.sub_(offset))


def score_gradient(maps: Maps, factors: Factors, grad_query: Tensor, grad_key: Tensor) -> None:
    """Write the gradients of query and key, the latter [G, H, M, D] with a head for each query head."""
    parts = _cut(maps)
    compute([partial(_gradients_of_part, maps, factors, blocks, grad_query, grad_key) for blocks in parts], maps.query)


def _gradients_of_part(maps: Maps, factors: Factors, blocks: Blocks, grad_query: Tensor, grad_key: Tensor) -> None:
    """Write the gradients of query and key of one map and head range."""
    query, key, scale = maps.query, maps.key, maps.scale
    dtype, last = working_dtype(query.dtype), blocks.keys[-1].stop if blocks.keys else 0
    by_query = by_key = key.new_empty(0, dtype=dtype)
    for block, gradient in _score_gradients(maps, factors, blocks):
        if block.keys.start == 0:
            by_query = gradient.new_zeros((*gradient.shape[:2], query.shape[3]))
            if block.queries.start == 0:
                by_key = gradient.new_zeros((gradient.shape[0], *key.shape[2:]))
        keys = key[block.group, block.key_heads][:, block.keys].to(dtype)
        by_query.baddbmm_(gradient, keys, alpha=scale)
        queries = query[block.group, block.heads, block.queries].to(dtype)
        by_key[:, block.keys].baddbmm_(gradient.transpose(1, 2), queries, alpha=scale)
        if block.keys.stop == last:
            grad_query[block.group, block.heads, block.queries] = by_query
            if block.queries.stop == query.shape[2]:
                grad_key[block.group, block.heads] = by_key


def bias_gradient(maps: Maps, factors: Factors, grad: Tensor) -> None:
    """Write dS to ``grad``, which has the shape of the bias, summed over the axes of size 1."""
    # As large as the bias, which may be as large as a map: no second one where the gradient holds sums itself.
    narrow = grad.dtype != working_dtype(grad.dtype)
    accumulated = torch.zeros_like(grad, dtype=working_dtype(grad.dtype)) if narrow else grad.zero_()
    # Heads may share the bias, so their blocks follow one another.
    for block, gradient in (found for blocks in _cut(maps) for found in _score_gradients(maps, factors, blocks)):
        wanted = (slice(block.group, block.group + 1), block.heads, block.queries, block.keys)
        part = accumulated[
            tuple(index if size > 1 else slice(None) for size, index in zip(grad.shape, wanted, strict=True))
        ]
        part += gradient.unsqueeze(0).sum_to_size(part.shape)
    if narrow:
        grad.copy_(accumulated)
