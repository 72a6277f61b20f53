"""Gradients of query and key from a known log-sum-exp, for ``apply`` and ``adjoint`` alike.

    dS_g = A_g ∘ (Σ_b X_b Y_bᵀ − δ_g),   dQ_g = scale · dS_g K_g,   dK_g = scale · dS_gᵀ Q_g

One kernel computes either: a program owns a tile of one token axis and streams the other. For dQ it owns queries and
the statistics belong to its rows; for dK it owns keys and they belong to the streamed columns. X and Y of batch rows
that share a map stand side by side, so one product is the sum over them. Every output is written by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def gradient_kernel(
    own_ptr,  # [G, H, T, D]: queries for dQ, keys for dK
    other_ptr,  # [G, H, S, D]: the other axis
    own_factor_ptr,  # [B, H, T, E]: X for dQ, Y for dK
    other_factor_ptr,  # [B, H, S, E]
    bias_ptr,  # [G, H, T, S], strides 0 where it is broadcast
    gradient_ptr,  # [G, H, T, D]
    logsumexp_ptr,  # [G, H, N], contiguous
    delta_ptr,  # [G, H, N], contiguous
    table_ptr,  # [programs' groups, 1 + BRANCHES]: the map, then its batch rows
    scale,
    heads,
    owns,
    others,
    own_stride_g,
    own_stride_h,
    own_stride_t,
    own_stride_d,
    other_stride_g,
    other_stride_h,
    other_stride_s,
    other_stride_d,
    own_factor_stride_b,
    own_factor_stride_h,
    own_factor_stride_t,
    own_factor_stride_e,
    other_factor_stride_b,
    other_factor_stride_h,
    other_factor_stride_s,
    other_factor_stride_e,
    bias_stride_g,
    bias_stride_h,
    bias_stride_t,
    bias_stride_s,
    gradient_stride_g,
    gradient_stride_h,
    gradient_stride_t,
    gradient_stride_d,
    lengths_ptr,  # [G]: the keys of each map
    HEAD_DIM: tl.constexpr,
    HEAD_0: tl.constexpr,
    HEAD_1: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BRANCHES: tl.constexpr,
    COLUMNS_0: tl.constexpr,
    COLUMNS_1: tl.constexpr,
    OWN_VECTOR: tl.constexpr,
    OTHER_VECTOR: tl.constexpr,
    OWN_FACTOR_VECTOR: tl.constexpr,
    OTHER_FACTOR_VECTOR: tl.constexpr,
    OWN_STATISTICS: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_VARIES: tl.constexpr,
    EVEN_OWNS: tl.constexpr,
    EVEN_OTHERS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HEADS_PER_OWN: tl.constexpr,
    HEADS_PER_OTHER: tl.constexpr,
    HEADS_PER_OWN_FACTOR: tl.constexpr,
    HEADS_PER_OTHER_FACTOR: tl.constexpr,
):
    COLUMNS: tl.constexpr = BRANCHES * VALUE_DIM
    EVEN_HEAD_0: tl.constexpr = HEAD_0 <= HEAD_DIM
    EVEN_HEAD_1: tl.constexpr = HEAD_0 + HEAD_1 <= HEAD_DIM
    EVEN_COLUMNS_0: tl.constexpr = COLUMNS_0 <= COLUMNS
    EVEN_COLUMNS_1: tl.constexpr = COLUMNS_0 + COLUMNS_1 <= COLUMNS
    tiles = tl.cdiv(owns, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = ((tl.program_id(0) // tiles) % heads).to(tl.int64)
    group_ptr = table_ptr + (tl.program_id(0) // tiles // heads) * (1 + BRANCHES)
    group = tl.load(group_ptr).to(tl.int64)

    own_stride_t = aligned(own_stride_t, OWN_VECTOR)
    other_stride_s = aligned(other_stride_s, OTHER_VECTOR)
    own_factor_stride_t = aligned(own_factor_stride_t, OWN_FACTOR_VECTOR)
    other_factor_stride_s = aligned(other_factor_stride_s, OTHER_FACTOR_VECTOR)
    start_m = tile.to(tl.int64) * BLOCK_M
    own_ptr += group * aligned(own_stride_g, OWN_VECTOR) + head // HEADS_PER_OWN * aligned(own_stride_h, OWN_VECTOR)
    own_ptr += start_m * own_stride_t
    other_ptr += group * aligned(other_stride_g, OTHER_VECTOR)
    other_ptr += head // HEADS_PER_OTHER * aligned(other_stride_h, OTHER_VECTOR)
    own_factor_ptr += head // HEADS_PER_OWN_FACTOR * aligned(own_factor_stride_h, OWN_FACTOR_VECTOR)
    own_factor_ptr += start_m * own_factor_stride_t
    other_factor_ptr += head // HEADS_PER_OTHER_FACTOR * aligned(other_factor_stride_h, OTHER_FACTOR_VECTOR)
    gradient_ptr += group * gradient_stride_g + head * gradient_stride_h + start_m * gradient_stride_t
    statistics = owns if OWN_STATISTICS else others
    logsumexp_ptr += (group * heads + head) * statistics
    delta_ptr += (group * heads + head) * statistics

    rows = tile_index(BLOCK_M, WIDE)
    columns = tile_index(BLOCK_N, WIDE)
    rows_end = owns - start_m
    row_valid = rows < rows_end
    others_stop = others
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + group)
        if OWN_STATISTICS:
            others = length
            others_stop = length
        else:
            # Gradients of keys past the length are written, and are zero.
            rows_end = length - start_m
            others_stop = others * (rows_end > 0).to(tl.int32)

    a0_columns, a0_valid = head_columns(own_stride_d, 0, HEAD_0, HEAD_DIM, WIDE)
    a0 = load_tile(own_ptr, rows, own_stride_t, a0_columns, rows_end, a0_valid, EVEN_OWNS, EVEN_HEAD_0)
    b0_columns, b0_valid = head_columns(other_stride_d, 0, HEAD_0, HEAD_DIM, WIDE)
    gradient_0 = tl.zeros([BLOCK_M, HEAD_0], dtype=tl.float32)
    a1 = a0
    if HEAD_1 > 0:
        a1_columns, a1_valid = head_columns(own_stride_d, HEAD_0, HEAD_1, HEAD_DIM, WIDE)
        a1 = load_tile(own_ptr, rows, own_stride_t, a1_columns, rows_end, a1_valid, EVEN_OWNS, EVEN_HEAD_1)
        b1_columns, b1_valid = head_columns(other_stride_d, HEAD_0, HEAD_1, HEAD_DIM, WIDE)
        gradient_1 = tl.zeros([BLOCK_M, HEAD_1], dtype=tl.float32)
    x0_columns, x0_valid = packed_columns(
        group_ptr + 1,
        own_factor_stride_b,
        own_factor_stride_e,
        0,
        COLUMNS_0,
        VALUE_DIM,
        COLUMNS,
        OWN_FACTOR_VECTOR,
        WIDE,
    )
    x0 = load_tile(own_factor_ptr, rows, own_factor_stride_t, x0_columns, rows_end, x0_valid, EVEN_OWNS, EVEN_COLUMNS_0)
    y0_columns, y0_valid = packed_columns(
        group_ptr + 1,
        other_factor_stride_b,
        other_factor_stride_e,
        0,
        COLUMNS_0,
        VALUE_DIM,
        COLUMNS,
        OTHER_FACTOR_VECTOR,
        WIDE,
    )
    x1 = x0
    if COLUMNS_1 > 0:
        x1_columns, x1_valid = packed_columns(
            group_ptr + 1,
            own_factor_stride_b,
            own_factor_stride_e,
            COLUMNS_0,
            COLUMNS_1,
            VALUE_DIM,
            COLUMNS,
            OWN_FACTOR_VECTOR,
            WIDE,
        )
        x1 = load_tile(
            own_factor_ptr, rows, own_factor_stride_t, x1_columns, rows_end, x1_valid, EVEN_OWNS, EVEN_COLUMNS_1
        )
        y1_columns, y1_valid = packed_columns(
            group_ptr + 1,
            other_factor_stride_b,
            other_factor_stride_e,
            COLUMNS_0,
            COLUMNS_1,
            VALUE_DIM,
            COLUMNS,
            OTHER_FACTOR_VECTOR,
            WIDE,
        )
    if HAS_BIAS:
        bias_ptr += group * bias_stride_g + head * bias_stride_h + start_m * bias_stride_t
    if OWN_STATISTICS:
        shift = finite_or_zero(tl.load(logsumexp_ptr + start_m + rows, mask=row_valid, other=0.0))[:, None] * LOG2E
        if FIRST:
            delta = tl.load(delta_ptr + start_m + rows, mask=row_valid, other=0.0)[:, None]

    for start_n in range(0, others_stop, BLOCK_N):
        columns_end = others - start_n
        column_valid = columns < columns_end
        b_ptr = other_ptr + tl.cast(start_n, tl.int64) * other_stride_s
        b0 = load_tile(b_ptr, columns, other_stride_s, b0_columns, columns_end, b0_valid, EVEN_OTHERS, EVEN_HEAD_0)
        b1 = b0
        if HEAD_1 > 0:
            b1 = load_tile(b_ptr, columns, other_stride_s, b1_columns, columns_end, b1_valid, EVEN_OTHERS, EVEN_HEAD_1)
        y_ptr = other_factor_ptr + tl.cast(start_n, tl.int64) * other_factor_stride_s
        y0 = load_tile(
            y_ptr, columns, other_factor_stride_s, y0_columns, columns_end, y0_valid, EVEN_OTHERS, EVEN_COLUMNS_0
        )
        y1 = y0
        if COLUMNS_1 > 0:
            y1 = load_tile(
                y_ptr, columns, other_factor_stride_s, y1_columns, columns_end, y1_valid, EVEN_OTHERS, EVEN_COLUMNS_1
            )
        scores = split_scores(a0, a1, b0, b1, HEAD_1 > 0, PRECISION) * (scale * LOG2E)
        if HAS_BIAS:
            scores = add_bias(
                scores,
                bias_ptr + tl.cast(start_n, tl.int64) * bias_stride_s,
                rows,
                columns,
                bias_stride_t,
                bias_stride_s,
                rows_end,
                columns_end,
                BIAS_VARIES,
                EVEN_OWNS and EVEN_OTHERS,
            )
        if not OWN_STATISTICS:
            # exp(S − inf) = 0: streamed tokens past the end give nothing.
            known = tl.load(logsumexp_ptr + start_n + columns, mask=column_valid, other=float("inf"))
            shift = finite_or_zero(known)[None, :] * LOG2E
            if FIRST:
                delta = tl.load(delta_ptr + start_n + columns, mask=column_valid, other=0.0)[None, :]
            if HAS_LENGTHS:
                scores = tl.where((rows < rows_end)[:, None], scores, float("-inf"))
        elif not EVEN_OTHERS:
            scores = tl.where(column_valid[None, :], scores, float("-inf"))
        probabilities = tl.exp2(scores - shift)
        outer = split_scores(x0, x1, y0, y1, COLUMNS_1 > 0, PRECISION)
        if FIRST:
            outer -= delta
        score_gradient = (probabilities * outer).to(b0.dtype)
        gradient_0 = dot(score_gradient, b0, gradient_0, PRECISION)
        if HEAD_1 > 0:
            gradient_1 = dot(score_gradient, b1, gradient_1, PRECISION)

    store_gradient(
        gradient_ptr, gradient_0 * scale, rows, row_valid, gradient_stride_t, gradient_stride_d, 0, HEAD_DIM, FIRST
    )
    if HEAD_1 > 0:
        store_gradient(
            gradient_ptr,
            gradient_1 * scale,
            rows,
            row_valid,
            gradient_stride_t,
            gradient_stride_d,
            HEAD_0,
            HEAD_DIM,
            FIRST,
        )


@triton.jit
def store_gradient(
    ptr,
    gradient,
    rows,
    row_valid,
    row_stride,
    entry_stride,
    START: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Write a piece of the gradient; chunks after the first add to what their forerunner wrote."""
    entries, valid = head_columns(entry_stride, START, gradient.shape[1], HEAD_DIM)
    ptrs = ptr + rows[:, None] * row_stride + entries[None, :]
    mask = row_valid[:, None] & valid[None, :]
    if not FIRST:
        gradient += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(ptrs, gradient.to(ptr.dtype.element_ty), mask=mask)
