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
from .launch import Launch, product_precision, strides
from .packing import Chunk, bias_varies, chunks, columns_of, device_table, needs_wide_index, split_width, vector_width
from .plans import launch_all
from .primitives import (
    LOG2E,
    add_bias,
    aligned,
    dot,
    finite_or_zero,
    head_columns,
    load_tile,
    packed_columns,
    split_scores,
    tile_index,
)


@triton.jit
def adjoint_kernel(
    query_ptr,  # [G, H, N, D]
    key_ptr,  # [G, H, M, D]
    weight_ptr,  # [B, H, N, E]
    bias_ptr,  # [G, H, N, M], strides 0 where it is broadcast
    out_ptr,  # [B, H, M, E]
    logsumexp_ptr,  # [G, H, N], contiguous
    table_ptr,  # [programs' groups, 1 + BRANCHES]: the map, then its batch rows
    scale,  # of the scores, times log2(e)
    heads,
    queries,
    keys,
    query_stride_g,
    query_stride_h,
    query_stride_n,
    query_stride_d,
    key_stride_g,
    key_stride_h,
    key_stride_m,
    key_stride_d,
    weight_stride_b,
    weight_stride_h,
    weight_stride_n,
    weight_stride_e,
    bias_stride_g,
    bias_stride_h,
    bias_stride_n,
    bias_stride_m,
    out_stride_b,
    out_stride_h,
    out_stride_m,
    out_stride_e,
    lengths_ptr,  # [G]: the keys of each map
    HEAD_DIM: tl.constexpr,
    HEAD_0: tl.constexpr,
    HEAD_1: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BRANCHES: tl.constexpr,
    COLUMNS_0: tl.constexpr,
    COLUMNS_1: tl.constexpr,
    QUERY_VECTOR: tl.constexpr,
    KEY_VECTOR: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_VARIES: tl.constexpr,
    EVEN_QUERIES: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HEADS_PER_KEY: tl.constexpr,
):
    COLUMNS: tl.constexpr = BRANCHES * VALUE_DIM
    tiles = tl.cdiv(keys, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = ((tl.program_id(0) // tiles) % heads).to(tl.int64)
    group_ptr = table_ptr + (tl.program_id(0) // tiles // heads) * (1 + BRANCHES)
    group = tl.load(group_ptr).to(tl.int64)

    query_stride_n = aligned(query_stride_n, QUERY_VECTOR)
    key_stride_m = aligned(key_stride_m, KEY_VECTOR)
    weight_stride_n = aligned(weight_stride_n, WEIGHT_VECTOR)
    out_stride_m = aligned(out_stride_m, OUT_VECTOR)
    start_m = tile.to(tl.int64) * BLOCK_M
    query_ptr += group * aligned(query_stride_g, QUERY_VECTOR) + head * aligned(query_stride_h, QUERY_VECTOR)
    key_ptr += group * aligned(key_stride_g, KEY_VECTOR) + head // HEADS_PER_KEY * aligned(key_stride_h, KEY_VECTOR)
    key_ptr += start_m * key_stride_m
    weight_ptr += head * aligned(weight_stride_h, WEIGHT_VECTOR)
    out_ptr += head * aligned(out_stride_h, OUT_VECTOR) + start_m * out_stride_m
    logsumexp_ptr += (group * heads + head) * queries

    rows = tile_index(BLOCK_M, WIDE)  # of the keys
    columns = tile_index(BLOCK_N, WIDE)  # of the queries
    rows_end = keys - start_m
    row_valid = rows < rows_end
    queries_stop = queries
    if HAS_LENGTHS:
        # Keys past the length of the map are written, and are zero; a tile of nothing else reads no query.
        rows_end = tl.load(lengths_ptr + group) - start_m
        queries_stop = queries * (rows_end > 0).to(tl.int32)

    d0, d0_valid = head_columns(key_stride_d, 0, HEAD_0, HEAD_DIM, WIDE)
    k0 = load_tile(key_ptr, rows, key_stride_m, d0, rows_end, d0_valid, EVEN_KEYS, HEAD_0 <= HEAD_DIM)
    q0_columns, q0_valid = head_columns(query_stride_d, 0, HEAD_0, HEAD_DIM, WIDE)
    k1 = k0
    if HEAD_1 > 0:
        d1, d1_valid = head_columns(key_stride_d, HEAD_0, HEAD_1, HEAD_DIM, WIDE)
        k1 = load_tile(key_ptr, rows, key_stride_m, d1, rows_end, d1_valid, EVEN_KEYS, HEAD_0 + HEAD_1 <= HEAD_DIM)
        q1_columns, q1_valid = head_columns(query_stride_d, HEAD_0, HEAD_1, HEAD_DIM, WIDE)
    w0_columns, w0_valid = packed_columns(
        group_ptr + 1, weight_stride_b, weight_stride_e, 0, COLUMNS_0, VALUE_DIM, COLUMNS, WEIGHT_VECTOR, WIDE
    )
    accumulator_0 = tl.zeros([BLOCK_M, COLUMNS_0], dtype=tl.float32)
    if COLUMNS_1 > 0:
        w1_columns, w1_valid = packed_columns(
            group_ptr + 1,
            weight_stride_b,
            weight_stride_e,
            COLUMNS_0,
            COLUMNS_1,
            VALUE_DIM,
            COLUMNS,
            WEIGHT_VECTOR,
            WIDE,
        )
        accumulator_1 = tl.zeros([BLOCK_M, COLUMNS_1], dtype=tl.float32)
    if HAS_BIAS:
        bias_ptr += group * bias_stride_g + head * bias_stride_h + start_m * bias_stride_m

    for start_n in range(0, queries_stop, BLOCK_N):
        queries_end = queries - start_n
        column_valid = columns < queries_end
        q_ptr = query_ptr + tl.cast(start_n, tl.int64) * query_stride_n
        q0 = load_tile(
            q_ptr, columns, query_stride_n, q0_columns, queries_end, q0_valid, EVEN_QUERIES, HEAD_0 <= HEAD_DIM
        )
        q1 = q0
        if HEAD_1 > 0:
            q1 = load_tile(
                q_ptr,
                columns,
                query_stride_n,
                q1_columns,
                queries_end,
                q1_valid,
                EVEN_QUERIES,
                HEAD_0 + HEAD_1 <= HEAD_DIM,
            )
        if EVEN_QUERIES:
            shift = tl.load(logsumexp_ptr + start_n + columns)
        else:
            # exp(S − inf) = 0: query rows past the end give nothing.
            shift = tl.load(logsumexp_ptr + start_n + columns, mask=column_valid, other=float("inf"))
        scores = split_scores(k0, k1, q0, q1, HEAD_1 > 0, PRECISION) * scale
        if HAS_BIAS:
            scores = add_bias(
                scores,
                bias_ptr + tl.cast(start_n, tl.int64) * bias_stride_n,
                rows,
                columns,
                bias_stride_m,
                bias_stride_n,
                rows_end,
                queries_end,
                BIAS_VARIES,
                EVEN_QUERIES and EVEN_KEYS,
            )
        if HAS_BIAS or HAS_LENGTHS:
            shift = finite_or_zero(shift)
        if HAS_LENGTHS:
            scores = tl.where((rows < rows_end)[:, None], scores, float("-inf"))
        probabilities = tl.exp2(scores - shift[None, :] * LOG2E)
        w_ptr = weight_ptr + tl.cast(start_n, tl.int64) * weight_stride_n
        w0 = load_tile(
            w_ptr, columns, weight_stride_n, w0_columns, queries_end, w0_valid, EVEN_QUERIES, COLUMNS_0 <= COLUMNS
        )
        probabilities = probabilities.to(w0.dtype)
        accumulator_0 = dot(probabilities, w0, accumulator_0, PRECISION)
        if COLUMNS_1 > 0:
            w1 = load_tile(
                w_ptr,
                columns,
                weight_stride_n,
                w1_columns,
                queries_end,
                w1_valid,
                EVEN_QUERIES,
                COLUMNS_0 + COLUMNS_1 <= COLUMNS,
            )
            accumulator_1 = dot(probabilities, w1, accumulator_1, PRECISION)

    out_rows = out_ptr + rows[:, None] * out_stride_m
    o0_columns, o0_valid = packed_columns(
        group_ptr + 1, out_stride_b, out_stride_e, 0, COLUMNS_0, VALUE_DIM, COLUMNS, OUT_VECTOR, WIDE
    )
    tl.store(
        out_rows + o0_columns[None, :],
        accumulator_0.to(out_ptr.dtype.element_ty),
        mask=row_valid[:, None] & o0_valid[None, :],
    )
    if COLUMNS_1 > 0:
        o1_columns, o1_valid = packed_columns(
            group_ptr + 1, out_stride_b, out_stride_e, COLUMNS_0, COLUMNS_1, VALUE_DIM, COLUMNS, OUT_VECTOR, WIDE
        )
        tl.store(
            out_rows + o1_columns[None, :],
            accumulator_1.to(out_ptr.dtype.element_ty),
            mask=row_valid[:, None] & o1_valid[None, :],
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
    query, key, weight, bias, out, logsumexp = tensors
    _, heads, queries, head_dim = query.shape
    keys, value_dim = key.shape[2], weight.shape[3]
    head_pieces, column_pieces = split_width(head_dim), split_width(chunk.branches * value_dim)
    full_bias = query if bias is None else bias
    table = device_table(chunk.table, query.device)
    return Launch(
        adjoint_kernel,
        programs=-(-keys // config.block_m) * heads * len(chunk.table),
        config=config,
        tensors={
            "query_ptr": query,
            "key_ptr": key,
            "weight_ptr": weight,
            "bias_ptr": full_bias,
            "out_ptr": out,
            "logsumexp_ptr": logsumexp,
            "table_ptr": table,
            "lengths_ptr": table if key_lengths is None else device_table((key_lengths,), query.device),
        },
        numbers={
            "scale": scale * LOG2E.value,
            "heads": heads,
            "queries": queries,
            "keys": keys,
            **strides("query", query, "ghnd"),
            **strides("key", key, "ghmd"),
            **strides("weight", weight, "bhne"),
            **strides("bias", full_bias, "ghnm"),
            **strides("out", out, "bhme"),
        },
        constants={
            "HEAD_DIM": head_dim,
            "HEAD_0": head_pieces[0],
            "HEAD_1": head_pieces[1],
            "VALUE_DIM": value_dim,
            "BRANCHES": chunk.branches,
            "COLUMNS_0": column_pieces[0],
            "COLUMNS_1": column_pieces[1],
            "QUERY_VECTOR": vector_width(query),
            "KEY_VECTOR": vector_width(key),
            "WEIGHT_VECTOR": vector_width(weight),
            "OUT_VECTOR": vector_width(out),
            "HAS_BIAS": bias is not None,
            "BIAS_VARIES": bias_varies(full_bias.transpose(2, 3)),
            "EVEN_QUERIES": queries % config.block_n == 0,
            "EVEN_KEYS": keys % config.block_m == 0 and key_lengths is None,
            "WIDE": needs_wide_index(
                (query, config.block_n),
                (key, config.block_m),
                (weight, config.block_n),
                (out, config.block_m),
                (full_bias, config.block_n),
            ),
            "PRECISION": product_precision(query.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "HAS_LENGTHS": key_lengths is not None,
            "HEADS_PER_KEY": heads // key.shape[1],
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
