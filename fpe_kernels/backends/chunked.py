"""The ``torch`` backend: bounded memory on any device, from PyTorch's own matrix products.

Scores exist for one block of queries and keys at a time, small enough to stay in a core's cache between the product
that makes them, the exponential and the product that uses them. The values of all batch rows that share a map stand
side by side, so the scores and the softmax of a block are computed once for all. Scores are in units of log 2: PyTorch
computes 2ˣ in a third of the time of eˣ. Where they cannot leave the range of the dtype (`bounded`) no largest score is
looked for. On a CPU there are shorter ways for a block that has all keys (`whole_maps`)
and for a map of one row's own, or a tiny one (`fused_cpu`). Half-precision inputs are widened block by block: products
and statistics are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from . import fused_cpu, whole_maps
from .blocks import LN2, Blocks, Buffers, Part, Scores, compute, cut_maps, lengths_of, operands
from .bounded import bounded
from .chunked_gradients import bias_gradient, score_gradient
from .cpu_threads import Task
from .grouping import rows_by_map
from .protocol import Maps
from .whole_maps import ready_call

__all__ = ["adjoint", "apply", "bias_gradient", "ready_call", "score_gradient"]


def apply(
    maps: Maps, value: Tensor, out: Tensor, logsumexp: Tensor, known: bool, row_weight: Tensor | None = None
) -> None:
    """Write ``row_weight ⊙ (A[map_index] @ value)`` to ``out`` and, unless it is known, the log-sum-exp."""
    by_map = rows_by_map(maps.map_index, maps.query.shape[0])
    if row_weight is not None and maps.query.device.type == "cpu":
        _weighted_apply(maps, by_map, value, out, logsumexp, known, row_weight)
        return
    _apply_maps(maps, by_map, value, out, logsumexp, known)
    if row_weight is not None:
        # What a weight selects is not known here without waiting for the device.
        out.mul_(row_weight.unsqueeze(-1))


def _weighted_apply(
    maps: Maps,
    by_map: Sequence[tuple[int, ...]],
    value: Tensor,
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
        if len(selected) == maps.query.shape[2]:
            continue
        whole[group] = ()
        out[index] = 0.0
        if not known:
            logsumexp[group] = float("inf")
        if len(selected) == 0:
            continue
        part_out = out.new_empty((len(index), out.shape[1], len(selected), out.shape[3]))
        statistics = logsumexp[group : group + 1, :, selected]
        part = _some_queries(maps, group, len(index), selected)
        _apply_maps(part, [tuple(range(len(index)))], value[index], part_out, statistics, known)
        for position, row in enumerate(index):
            out[row, :, selected] = part_out[position]
        if not known:
            logsumexp[group : group + 1, :, selected] = statistics
    _apply_maps(maps, whole, value, out, logsumexp, known)
    out.mul_(row_weight.unsqueeze(-1))


def _some_queries(maps: Maps, group: int, rows: int, selected: Tensor) -> Maps:
    """The ``selected`` query tokens of one map, which ``rows`` batch rows name."""
    own, bias = slice(group, group + 1), maps.bias
    if bias is not None:
        # Along the axes where it varies only: a row of key padding is not to become a map.
        bias = bias if bias.shape[0] == 1 else bias[own]
        bias = bias if bias.shape[2] == 1 else bias[:, :, selected]
    lengths = None if maps.key_lengths is None else maps.key_lengths[own]
    return Maps(maps.query[own, :, selected], maps.key[own], bias, (0,) * rows, maps.scale, lengths)


def _apply_maps(
    maps: Maps, by_map: Sequence[tuple[int, ...]], value: Tensor, out: Tensor, logsumexp: Tensor, known: bool
) -> None:
    """The unweighted product for the batch rows of every map in ``by_map``; other rows stay as they are."""
    query, key, bias, _, scale, key_lengths = maps
    lengths = lengths_of(key, key_lengths)
    by_map = _without_keys(by_map, lengths, out, logsumexp, known)
    plain = bias is None and not known
    if plain:
        runs, by_map = fused_cpu.runs(query, key, value, by_map, lengths)
        for run in runs:
            fused_cpu.write_product(run, query, key, value, scale, out, logsumexp)
    asked = plain and query.device.type == "cpu"
    in_range = [
        # What a fused call has served has no rows left here.
        asked and bool(rows) and bounded(query, key, value, scale, group, rows, lengths[group])
        for group, rows in enumerate(by_map)
    ]
    tasks: list[Task] = []
    buffers = Buffers()
    for blocks in cut_maps(query, key, by_map, lengths):
        if plain and whole_maps.serves(blocks, query, key, value, out):
            some = whole_maps.whole_blocks(blocks, query, key, value, out)
            of_map = scale, in_range[blocks.group], out, logsumexp, buffers
            tasks += [partial(block.write, query, key, value, *of_map) for block in some]
            continue
        part = Part(partial(operands, maps, value, blocks, buffers), len(blocks.queries))
        product_of = _known_product if known else _bounded_product if in_range[blocks.group] else _online_product
        tasks += [
            partial(_product_of_block, part, blocks, queries, out, logsumexp, product_of) for queries in blocks.queries
        ]
    compute(tasks, query)
    buffers.release()


def _product_of_block(
    part: Part, blocks: Blocks, queries: slice, out: Tensor, logsumexp: Tensor, product_of: ProductOf
) -> None:
    """The product of one block of queries with all keys, written to the rows of its map."""
    with part.held() as (scores_of, packed):
        columns = packed.shape[2] // len(blocks.rows)
        statistics = logsumexp[blocks.group, blocks.heads, queries]
        product, normaliser = product_of(scores_of, packed, queries, blocks.keys, statistics)
        for position, row in enumerate(blocks.rows):
            own = product[..., position * columns : (position + 1) * columns]
            target = out[row, blocks.heads, queries]
            if normaliser is None:
                target.copy_(own)
            elif target.dtype == own.dtype:
                torch.div(own, normaliser, out=target)
            else:
                target.copy_(own / normaliser)


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


ProductOf = Callable[[Scores, Tensor, slice, list[slice], Tensor], tuple[Tensor, Tensor | None]]
"""How a block of queries is multiplied with all keys: the product, and what to divide it by."""


def _known_product(
    scores_of: Scores, packed: Tensor, queries: slice, keys: list[slice], logsumexp: Tensor
) -> tuple[Tensor, None]:
    """The product over all key blocks of a map whose log-sum-exp is given."""
    product = torch.bmm(scores_of.probabilities(queries, keys[0], logsumexp), packed[:, keys[0]])
    for block in keys[1:]:
        product.baddbmm_(scores_of.probabilities(queries, block, logsumexp), packed[:, block])
    return product, None


def _bounded_product(
    scores_of: Scores, packed: Tensor, queries: slice, keys: list[slice], logsumexp: Tensor
) -> tuple[Tensor, Tensor]:
    """The product over all key blocks where exponentials need no shift, and its sums; writes the log-sum-exp."""
    exponentials = scores_of(queries, keys[0]).exp2_()
    product = torch.bmm(exponentials, packed[:, keys[0]])
    normaliser = exponentials.sum(-1, keepdim=True)
    for block in keys[1:]:
        exponentials = scores_of(queries, block).exp2_()
        product.baddbmm_(exponentials, packed[:, block])
        normaliser.add_(exponentials.sum(-1, keepdim=True))
    logsumexp.copy_(normaliser.log2().mul_(LN2).squeeze(-1))
    return product, normaliser


def _online_product(
    scores_of: Scores, packed: Tensor, queries: slice, keys: list[slice], logsumexp: Tensor
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
    logsumexp.copy_(normaliser.log2().add_(maximum).mul_(LN2).squeeze(-1))
    return product, normaliser.masked_fill_(normaliser == 0.0, 1.0) if masked else normaliser


def adjoint(maps: Maps, weight: Tensor, out: Tensor, logsumexp: Tensor) -> None:
    """Write ``A[map_index].T @ weight`` to ``out``."""
    query, key = maps.query, maps.key
    by_map, lengths = rows_by_map(maps.map_index, query.shape[0]), lengths_of(key, maps.key_lengths)
    for rows, length in zip(by_map, lengths, strict=True):
        if rows and length < key.shape[2]:
            out[list(rows), :, length:] = 0.0
    tasks: list[Task] = []
    buffers = Buffers()
    for blocks in cut_maps(query, key, by_map, lengths):
        part = Part(partial(operands, maps, weight, blocks, buffers), len(blocks.keys))
        tasks += [partial(_adjoint_of_block, part, blocks, keys, logsumexp, out) for keys in blocks.keys]
    compute(tasks, query)
    buffers.release()


def _adjoint_of_block(part: Part, blocks: Blocks, keys: slice, logsumexp: Tensor, out: Tensor) -> None:
    """The adjoint product of one block of keys with all queries, written to the rows of its map."""
    with part.held() as (scores_of, packed):
        columns = packed.shape[2] // len(blocks.rows)
        total = packed.new_zeros((packed.shape[0], keys.stop - keys.start, packed.shape[2]))
        for queries in blocks.queries:
            maps = scores_of.probabilities(queries, keys, logsumexp[blocks.group, blocks.heads, queries])
            total.baddbmm_(maps.transpose(1, 2), packed[:, queries])
        for position, row in enumerate(blocks.rows):
            out[row, blocks.heads, keys] = total[..., position * columns : (position + 1) * columns]
