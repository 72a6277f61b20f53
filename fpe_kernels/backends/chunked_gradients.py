"""Gradients of the ``torch`` backend, block by block: dS = A ∘ (Σ left rightᵀ − delta)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .blocks import Block, Blocks, Scores, compute, cut_maps, lengths_of, pack, working_dtype
from .grouping import rows_by_map


def _score_gradients(
    query: Tensor,
    key: Tensor,
    left: Tensor,
    right: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    blocks: Blocks,
    scale: float,
) -> Iterator[tuple[Block, Tensor]]:
    """Yield dS for every block, key blocks innermost; the tensor is valid until the next one is asked for."""
    scores_of = Scores(query, key, bias, scale, blocks)
    # Side by side, the product over all columns is the sum over the batch rows.
    lefts = pack(left, blocks.rows, blocks.heads, 1, scores_of.dtype)
    repeats = query.shape[1] // right.shape[1]
    rights = pack(right, blocks.rows, blocks.heads, repeats, scores_of.dtype).transpose(1, 2)
    for queries in blocks.queries:
        statistics = logsumexp[blocks.group, blocks.heads, queries]
        offset = delta[blocks.group, blocks.heads, queries].unsqueeze(-1)
        for keys in blocks.keys:
            maps = scores_of.probabilities(queries, keys, statistics)
            outer = torch.bmm(lefts[:, queries], rights[:, :, keys])
            block = Block(blocks.group, blocks.heads, queries, keys, blocks.key_heads)
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
    by_map, lengths = rows_by_map(map_index, query.shape[0]), lengths_of(key, key_lengths)
    inputs = query, key, left, right, delta, bias, logsumexp
    parts = cut_maps(query, key, by_map, lengths)
    compute([partial(_gradients_of_part, *inputs, blocks, scale, grad_query, grad_key) for blocks in parts], query)
    for group, rows in enumerate(by_map):
        if not rows or lengths[group] == 0:
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
    blocks: Blocks,
    scale: float,
    grad_query: Tensor,
    grad_key: Tensor,
) -> None:
    """Write the gradients of query and key of one map and head range."""
    dtype, last = working_dtype(query.dtype), blocks.keys[-1].stop if blocks.keys else 0
    by_query = by_key = key.new_empty(0, dtype=dtype)
    for block, gradient in _score_gradients(query, key, left, right, delta, bias, logsumexp, blocks, scale):
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
    accumulated = torch.zeros_like(grad, dtype=working_dtype(grad.dtype))
    # Heads may share the bias, so their blocks follow one another.
    inputs = query, key, left, right, delta, bias, logsumexp
    parts = cut_maps(query, key, rows_by_map(map_index, query.shape[0]), lengths_of(key, key_lengths))
    for block, gradient in (found for blocks in parts for found in _score_gradients(*inputs, blocks, scale)):
        wanted = (slice(block.group, block.group + 1), block.heads, block.queries, block.keys)
        part = accumulated[
            tuple(index if size > 1 else slice(None) for size, index in zip(bias.shape, wanted, strict=True))
        ]
        part += gradient.unsqueeze(0).sum_to_size(part.shape)
    grad.copy_(accumulated)
