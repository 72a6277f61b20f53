"""Adjoint: Y_b = A_gᵀ W_b from a known log-sum-exp, g = map_index[b]. It is also the gradient of the values.

A program owns a tile of keys and streams the queries, so every output is written once and nothing is added atomically.
The weights of the batch rows that share a map stand side by side as packed columns, as the values do in ``apply``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..protocol import Maps
from . import configs
from .configs import MAX_COLUMNS, Config
from .launch import Launch, product_precision
from .packing import (
    Chunk,
    bias_varies,
    chunks,
    columns_of,
    device_lengths,
    device_table,
    needs_wide_index,
    vector_width,
    widths,
)
from .pieces import add_products, head_columns, load_pieces, packed_columns, split_scores, store_columns, zero_pieces
from .plans import launch_all
from .primitives import LOG2E, add_bias, aligned, finite_or_zero, head_of, map_of, own_tile, tile_index


@triton.jit
def adjoint_kernel(
    query_ptr,  # [G, H, N, D]
    key_ptr,  # [G, H, M, D]
    weight_ptr,  # [B, H, N, E]
    bias_ptr,  # [G, H, N, M], strides 0 where it is broadcast; or None
    out_ptr,  # [B, H, M, E]
    logsumexp_ptr,  # [G, H, N], contiguous
    table_ptr,  # [programs' groups, 1 + BRANCHES]: the map, then its batch rows
    lengths_ptr,  # [G]: the keys of each map; or None
    tokens,  # queries, keys; the order of the numbers is worth registers: decision 0007
    query_strides,
    key_strides,
    weight_strides,
    heads,
    out_strides,
    bias_strides,
    scale,  # of the scores, times log2(e)
    HEAD: tl.constexpr,  # widths of a head
    COLUMNS: tl.constexpr,  # widths of the packed columns
    BRANCHES: tl.constexpr,
    VECTORS: tl.constexpr,  # of query, key, weight, out
    SHARING: tl.constexpr,  # query heads that share a head of key
    BLOCK: tl.constexpr,  # keys, queries
    EVEN: tl.constexpr,  # whether tiles of keys, of queries, are whole
    BIAS_VARIES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BLOCK[0]
    BLOCK_N: tl.constexpr = BLOCK[1]
    queries, keys = tokens
    tile, head, group, rows_ptr = own_tile(table_ptr, keys, heads, BRANCHES, BLOCK_M)
    query_stride, key_stride = aligned(query_strides[2], VECTORS[0]), aligned(key_strides[2], VECTORS[1])
    weight_stride, out_stride = aligned(weight_strides[2], VECTORS[2]), aligned(out_strides[2], VECTORS[3])
    start_m = tile.to(tl.int64) * BLOCK_M
    query_ptr = map_of(query_ptr, group, head, query_strides, VECTORS[0])
    key_ptr = map_of(key_ptr, group, head, key_strides, VECTORS[1], SHARING) + start_m * key_stride
    weight_ptr = head_of(weight_ptr, head, weight_strides, VECTORS[2])
    out_ptr = head_of(out_ptr, head, out_strides, VECTORS[3]) + start_m * out_stride
    logsumexp_ptr += (group * heads + head) * queries

    rows, columns = tile_index(BLOCK_M, WIDE), tile_index(BLOCK_N, WIDE)  # of the keys, of the queries
    rows_end = keys - start_m
    row_valid = rows < rows_end
    queries_stop = queries
    if lengths_ptr is not None:
        # Keys past the length of the map are written, and are zero; a tile of nothing else reads no query.
        rows_end = tl.load(lengths_ptr + group) - start_m
        queries_stop = queries * (rows_end > 0).to(tl.int32)
    key_columns = head_columns(key_strides[3], HEAD, WIDE)
    k = load_pieces(key_ptr, rows, key_stride, key_columns, rows_end, HEAD, EVEN[0])
    query_columns = head_columns(query_strides[3], HEAD, WIDE)
    weight_columns = packed_columns(rows_ptr, weight_strides, COLUMNS, BRANCHES, VECTORS[2], WIDE)
    accumulators = zero_pieces(BLOCK_M, COLUMNS)
    if bias_ptr is not None:
        bias_ptr += group * bias_strides[0] + head * bias_strides[1] + start_m * bias_strides[3]

    for start_n in range(0, queries_stop, BLOCK_N):
        queries_end = queries - start_n
        column_valid = columns < queries_end
        start = tl.cast(start_n, tl.int64)
        q_ptr = query_ptr + start * query_stride
        q = load_pieces(q_ptr, columns, query_stride, query_columns, queries_end, HEAD, EVEN[1])
        if EVEN[1]:
            shift = tl.load(logsumexp_ptr + start_n + columns)
        else:
            # exp(S − inf) = 0: query rows past the end give nothing.
            shift = tl.load(logsumexp_ptr + start_n + columns, mask=column_valid, other=float("inf"))
        scores = split_scores(k, q, PRECISION) * scale
        if bias_ptr is not None:
            scores = add_bias(
                scores,
                bias_ptr + start * bias_strides[2],
                rows,
                columns,
                bias_strides[3],
                bias_strides[2],
                rows_end,
                queries_end,
                BIAS_VARIES,
                EVEN[0] and EVEN[1],
            )
        if bias_ptr is not None or lengths_ptr is not None:
            shift = finite_or_zero(shift)
        if lengths_ptr is not None:
            scores = tl.where((rows < rows_end)[:, None], scores, float("-inf"))
        probabilities = tl.exp2(scores - shift[None, :] * LOG2E)
        w_ptr = weight_ptr + start * weight_stride
        accumulators = add_products(
            accumulators,
            probabilities,
            w_ptr,
            columns,
            weight_stride,
            weight_columns,
            queries_end,
            COLUMNS,
            EVEN[1],
            PRECISION,
        )
    store_columns(
        out_ptr, accumulators, rows_ptr, rows, row_valid, out_stride, out_strides, COLUMNS, BRANCHES, VECTORS[3], WIDE
    )


class AdjointTensors(NamedTuple):
    """What the launches of an adjoint product read and write.

    Args:
        query, key: [G, H, N, D] and [G, h, M, D].
        weight: [B, H, N, E].
        bias: [G, H, N, M], or None.
        out: [B, H, M, E].
        logsumexp: [G, H, N], contiguous.
    """

    query: Tensor
    key: Tensor
    weight: Tensor
    bias: Tensor | None
    out: Tensor
    logsumexp: Tensor

    def of(self, chunk: Chunk) -> AdjointTensors:
        """Narrowed to the columns of a chunk."""
        return self._replace(weight=columns_of(self.weight, chunk), out=columns_of(self.out, chunk))


def prepare(
    tensors: AdjointTensors, chunk: Chunk, scale: float, config: Config, key_lengths: tuple[int, ...] | None = None
) -> Launch:
    """The launch of one chunk, of tensors that are narrowed to its columns."""
    query, key, weight, bias, out, _ = tensors
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    of_keys, of_queries = (key, out), (query, weight, bias)
    return Launch(
        adjoint_kernel,
        programs=-(-keys // config.block_m) * heads * len(chunk.table),
        config=config,
        tensors={
            **{f"{name}_ptr": tensor for name, tensor in tensors._asdict().items()},
            "table_ptr": device_table(chunk.table, query.device),
            "lengths_ptr": device_lengths(key_lengths, query.device),
        },
        numbers={
            "scale": scale * LOG2E.value,
            "heads": heads,
            "tokens": (queries, keys),
            "query_strides": query.stride(),
            "key_strides": key.stride(),
            "weight_strides": weight.stride(),
            "bias_strides": None if bias is None else bias.stride(),
            "out_strides": out.stride(),
        },
        constants={
            "HEAD": widths(query.shape[3]),
            "COLUMNS": widths(chunk.branches * weight.shape[3]),
            "BRANCHES": chunk.branches,
            "VECTORS": tuple(map(vector_width, (query, key, weight, out))),
            "SHARING": heads // key.shape[1],
            "BLOCK": (config.block_m, config.block_n),
            "EVEN": (keys % config.block_m == 0 and key_lengths is None, queries % config.block_n == 0),
            "BIAS_VARIES": bias_varies(None if bias is None else bias.transpose(2, 3)),
            "WIDE": needs_wide_index(config.block_m, *of_keys) or needs_wide_index(config.block_n, *of_queries),
            "PRECISION": product_precision(query.dtype),
        },
    )


class AdjointSettings(NamedTuple):
    """What the launches follow from besides the tensors."""

    map_index: tuple[int, ...]
    scale: float
    key_lengths: tuple[int, ...] | None
    adjoint_config: Callable[..., Config]


def adjoint(maps: Maps, weight: Tensor, out: Tensor, logsumexp: Tensor) -> None:
    """Write ``A[map_index].T @ weight`` to ``out``."""
    tensors = AdjointTensors(maps.query, maps.key, weight, maps.bias, out, logsumexp.contiguous())
    launch_all(plan, tensors, AdjointSettings(maps.map_index, maps.scale, maps.key_lengths, configs.adjoint_config))


def plan(tensors: AdjointTensors, settings: AdjointSettings) -> Iterator[Launch]:
    """The launches of :func:`adjoint`."""
    query, key, weight, bias, _, _ = tensors
    if bias is not None:
        tensors = tensors._replace(bias=bias.expand(*query.shape[:3], key.shape[2]))
    tf32 = product_precision(query.dtype) == "tf32"
    for chunk in chunks(settings.map_index, query.shape[0], weight.shape[3], MAX_COLUMNS[query.element_size()]):
        if chunk.stop > chunk.start:
            part = tensors.of(chunk)
            config = settings.adjoint_config(query, part.weight, chunk, bias is not None, key.shape[2], tf32)
            yield prepare(part, chunk, settings.scale, config, settings.key_lengths)
