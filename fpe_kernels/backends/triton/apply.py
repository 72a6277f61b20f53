"""Forward: many value columns through one pass over the scores.

    O_b = w_b ⊙ softmax(scale · Q_g K_gᵀ + bias_g) V_b     for every batch row b with map_index[b] = g
    L_g = log Σ_m exp(scale · q_n · k_m + bias_nm)

The values of the branches b that share g stand side by side as packed columns: a program computes the scores and the
softmax of a query tile once and multiplies with all of them. Where L is known already (later chunks of columns, replay
of a recorded map), the running maximum and the rescaling drop out: P = exp(S − L).

Weights w, one for each query row, multiply the accumulators last. Where those of all branches are zero for a whole tile
of query rows, the program reads no key: the output is zero and L is +∞ there, from which every later kernel makes
probabilities of zero, as the gradient of a product with weight zero wants them. A launch whose L other branches of the
map still need computes such tiles all the same.

Branches that name the row before them again are there to make maps of one launch equally wide: read and not written.

Keys past the length of a map do not exist, as if the tensor ended there. Several query heads may share a head of the
keys, or of the values.

A launch over some of the keys may take up the product O' over others, with their log-sum-exp L':

    O_b = w_b ⊙ (exp(L_g − M_b) ⊙ A_g V_b + exp(L'_b − M_b) ⊙ O'_b),   M_b = log(exp L_g + exp L'_b)

L' is a row's own where the other keys are, so the shares differ by branch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LN2,
    LOG2E,
    add_bias,
    aligned,
    branch_weight,
    dot,
    finite_or_zero,
    head_columns,
    load_tile,
    online_softmax_update,
    packed_columns,
    split_scores,
    take_up,
    tile_index,
    weigh,
)


@triton.jit
def apply_kernel(
    query_ptr,  # [G, H, N, D]
    key_ptr,  # [G, H, M, D]
    value_ptr,  # [B, H, M, E]
    bias_ptr,  # [G, H, N, M], strides 0 where it is broadcast
    out_ptr,  # [B, H, N, E]
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
    value_stride_b,
    value_stride_h,
    value_stride_m,
    value_stride_e,
    bias_stride_g,
    bias_stride_h,
    bias_stride_n,
    bias_stride_m,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    out_stride_e,
    row_weight_ptr,  # [B, H, N], strides 0 where it is broadcast
    row_weight_stride_b,
    row_weight_stride_h,
    row_weight_stride_n,
    lengths_ptr,  # [G]: the keys of each map
    prior_ptr,  # [B, H, N, E], float32, with the strides of out: the product over other keys
    prior_logsumexp_ptr,  # [B, H, N], contiguous: the log-sum-exp over those
    HEAD_DIM: tl.constexpr,
    HEAD_0: tl.constexpr,
    HEAD_1: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BRANCHES: tl.constexpr,
    COLUMNS_0: tl.constexpr,
    COLUMNS_1: tl.constexpr,
    QUERY_VECTOR: tl.constexpr,
    KEY_VECTOR: tl.constexpr,
    VALUE_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    KNOWN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_VARIES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SKIPS: tl.constexpr,
    REPEATS: tl.constexpr,
    PRESCALE: tl.constexpr,
    EVEN_QUERIES: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HEADS_PER_KEY: tl.constexpr,
    HEADS_PER_VALUE: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
):
    COLUMNS: tl.constexpr = BRANCHES * VALUE_DIM
    EVEN_HEAD_0: tl.constexpr = HEAD_0 <= HEAD_DIM
    EVEN_HEAD_1: tl.constexpr = HEAD_0 + HEAD_1 <= HEAD_DIM
    EVEN_COLUMNS_0: tl.constexpr = COLUMNS_0 <= COLUMNS
    EVEN_COLUMNS_1: tl.constexpr = COLUMNS_0 + COLUMNS_1 <= COLUMNS
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % heads
    group_ptr = table_ptr + (tl.program_id(0) // tiles // heads) * (1 + BRANCHES)
    group = tl.load(group_ptr).to(tl.int64)
    head64 = head.to(tl.int64)
    if HAS_LENGTHS:
        keys = tl.load(lengths_ptr + group)

    query_stride_g = aligned(query_stride_g, QUERY_VECTOR)
    query_stride_h = aligned(query_stride_h, QUERY_VECTOR)
    query_stride_n = aligned(query_stride_n, QUERY_VECTOR)
    key_stride_g = aligned(key_stride_g, KEY_VECTOR)
    key_stride_h = aligned(key_stride_h, KEY_VECTOR)
    key_stride_m = aligned(key_stride_m, KEY_VECTOR)
    value_stride_h = aligned(value_stride_h, VALUE_VECTOR)
    value_stride_m = aligned(value_stride_m, VALUE_VECTOR)
    out_stride_h = aligned(out_stride_h, OUT_VECTOR)
    out_stride_n = aligned(out_stride_n, OUT_VECTOR)

    query_ptr += group * query_stride_g + head64 * query_stride_h
    key_ptr += group * key_stride_g + head64 // HEADS_PER_KEY * key_stride_h
    value_ptr += head64 // HEADS_PER_VALUE * value_stride_h
    out_ptr += head64 * out_stride_h
    logsumexp_ptr += (group * heads + head64) * queries

    start_m = tile.to(tl.int64) * BLOCK_M
    rows = tile_index(BLOCK_M, WIDE)
    rows_end = queries - start_m
    row_valid = rows < rows_end
    columns = tile_index(BLOCK_N, WIDE)

    query_ptr += start_m * query_stride_n
    d0, d0_valid = head_columns(query_stride_d, 0, HEAD_0, HEAD_DIM, WIDE)
    q0 = load_tile(query_ptr, rows, query_stride_n, d0, rows_end, d0_valid, EVEN_QUERIES, EVEN_HEAD_0)
    k0_columns, k0_valid = head_columns(key_stride_d, 0, HEAD_0, HEAD_DIM, WIDE)
    q1 = q0
    if HEAD_1 > 0:
        d1, d1_valid = head_columns(query_stride_d, HEAD_0, HEAD_1, HEAD_DIM, WIDE)
        q1 = load_tile(query_ptr, rows, query_stride_n, d1, rows_end, d1_valid, EVEN_QUERIES, EVEN_HEAD_1)
        k1_columns, k1_valid = head_columns(key_stride_d, HEAD_0, HEAD_1, HEAD_DIM, WIDE)
    if COLUMNS_0 > 0:
        v0_columns, v0_valid = packed_columns(
            group_ptr + 1, value_stride_b, value_stride_e, 0, COLUMNS_0, VALUE_DIM, COLUMNS, VALUE_VECTOR, WIDE
        )
        accumulator_0 = tl.zeros([BLOCK_M, COLUMNS_0], dtype=tl.float32)
    if COLUMNS_1 > 0:
        v1_columns, v1_valid = packed_columns(
            group_ptr + 1, value_stride_b, value_stride_e, COLUMNS_0, COLUMNS_1, VALUE_DIM, COLUMNS, VALUE_VECTOR, WIDE
        )
        accumulator_1 = tl.zeros([BLOCK_M, COLUMNS_1], dtype=tl.float32)
    if HAS_BIAS:
        bias_ptr += group * bias_stride_g + head64 * bias_stride_h + start_m * bias_stride_n

    if KNOWN:
        shift = finite_or_zero(tl.load(logsumexp_ptr + start_m + rows, mask=row_valid, other=0.0)) * LOG2E
    else:
        maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        normaliser = tl.zeros([BLOCK_M], dtype=tl.float32)

    keys_stop = keys
    if HAS_WEIGHT:
        row_weight_ptr += head64 * row_weight_stride_h + start_m * row_weight_stride_n
    if SKIPS:
        weighted = tl.zeros([BLOCK_M], dtype=tl.int32)
        for branch in range(BRANCHES):
            weight = branch_weight(
                row_weight_ptr, group_ptr + 1, branch, row_weight_stride_b, rows, row_weight_stride_n, row_valid
            )
            weighted |= (weight != 0.0).to(tl.int32)
        keys_stop = keys * tl.max(weighted, 0)

    # A positive scale commutes with the maximum, so it folds into the exponent's multiply-add.
    factor = scale
    if PRESCALE:
        factor = 1.0
    for start_n in range(0, keys_stop, BLOCK_N):
        keys_end = keys - start_n
        k_ptr = key_ptr + tl.cast(start_n, tl.int64) * key_stride_m
        k0 = load_tile(k_ptr, columns, key_stride_m, k0_columns, keys_end, k0_valid, EVEN_KEYS, EVEN_HEAD_0)
        k1 = k0
        if HEAD_1 > 0:
            k1 = load_tile(k_ptr, columns, key_stride_m, k1_columns, keys_end, k1_valid, EVEN_KEYS, EVEN_HEAD_1)
        scores = split_scores(q0, q1, k0, k1, HEAD_1 > 0, PRECISION)
        if PRESCALE:
            scores *= scale
        if HAS_BIAS:
            scores = add_bias(
                scores,
                bias_ptr + tl.cast(start_n, tl.int64) * bias_stride_m,
                rows,
                columns,
                bias_stride_n,
                bias_stride_m,
                rows_end,
                keys_end,
                BIAS_VARIES,
                EVEN_QUERIES and EVEN_KEYS,
            )
        if not EVEN_KEYS:
            scores = tl.where((columns < keys_end)[None, :], scores, float("-inf"))
        if KNOWN:
            probabilities = tl.exp2(scores * factor - shift[:, None])
        else:
            probabilities, rescale, maximum, normaliser = online_softmax_update(
                scores, factor, maximum, normaliser, HAS_BIAS
            )
            if COLUMNS_0 > 0:
                accumulator_0 *= rescale[:, None]
            if COLUMNS_1 > 0:
                accumulator_1 *= rescale[:, None]
        v_ptr = value_ptr + tl.cast(start_n, tl.int64) * value_stride_m
        if COLUMNS_0 > 0:
            v0 = load_tile(v_ptr, columns, value_stride_m, v0_columns, keys_end, v0_valid, EVEN_KEYS, EVEN_COLUMNS_0)
            probabilities = probabilities.to(v0.dtype)
            accumulator_0 = dot(probabilities, v0, accumulator_0, PRECISION)
        if COLUMNS_1 > 0:
            v1 = load_tile(v_ptr, columns, value_stride_m, v1_columns, keys_end, v1_valid, EVEN_KEYS, EVEN_COLUMNS_1)
            accumulator_1 = dot(probabilities, v1, accumulator_1, PRECISION)

    if not KNOWN:
        logsumexp = (maximum + tl.log2(normaliser)) * LN2
        if SKIPS:
            logsumexp = tl.where(keys_stop > 0, logsumexp, float("inf"))
        tl.store(logsumexp_ptr + start_m + rows, logsumexp, mask=row_valid)
        inverse = 1.0 / tl.where(normaliser == 0.0, 1.0, normaliser)
        if COLUMNS_0 > 0:
            accumulator_0 *= inverse[:, None]
        if COLUMNS_1 > 0:
            accumulator_1 *= inverse[:, None]

    if HAS_PRIOR:
        if KNOWN:
            logsumexp = tl.load(logsumexp_ptr + start_m + rows, mask=row_valid, other=0.0)
        prior_rows = prior_ptr + head64 * out_stride_h + (start_m + rows)[:, None] * out_stride_n
        prior_logsumexp_ptr += head64 * queries + start_m
        if COLUMNS_0 > 0:
            accumulator_0 = take_up(
                accumulator_0,
                logsumexp,
                prior_rows,
                prior_logsumexp_ptr,
                group_ptr + 1,
                heads * queries,
                rows,
                row_valid,
                out_stride_b,
                out_stride_e,
                0,
                VALUE_DIM,
                BRANCHES,
                OUT_VECTOR,
                WIDE,
            )
        if COLUMNS_1 > 0:
            accumulator_1 = take_up(
                accumulator_1,
                logsumexp,
                prior_rows,
                prior_logsumexp_ptr,
                group_ptr + 1,
                heads * queries,
                rows,
                row_valid,
                out_stride_b,
                out_stride_e,
                COLUMNS_0,
                VALUE_DIM,
                BRANCHES,
                OUT_VECTOR,
                WIDE,
            )

    if HAS_WEIGHT:
        for branch in range(BRANCHES):
            weight = branch_weight(
                row_weight_ptr, group_ptr + 1, branch, row_weight_stride_b, rows, row_weight_stride_n, row_valid
            )
            if COLUMNS_0 > 0:
                accumulator_0 = weigh(accumulator_0, weight, branch, 0, VALUE_DIM, BRANCHES)
            if COLUMNS_1 > 0:
                accumulator_1 = weigh(accumulator_1, weight, branch, COLUMNS_0, VALUE_DIM, BRANCHES)

    out_ptr += start_m * out_stride_n
    out_rows = out_ptr + rows[:, None] * out_stride_n
    if COLUMNS_0 > 0:
        o0_columns, o0_valid = packed_columns(
            group_ptr + 1, out_stride_b, out_stride_e, 0, COLUMNS_0, VALUE_DIM, COLUMNS, OUT_VECTOR, WIDE, REPEATS
        )
        tl.store(
            out_rows + o0_columns[None, :],
            accumulator_0.to(out_ptr.dtype.element_ty),
            mask=row_valid[:, None] & o0_valid[None, :],
        )
    if COLUMNS_1 > 0:
        o1_columns, o1_valid = packed_columns(
            group_ptr + 1,
            out_stride_b,
            out_stride_e,
            COLUMNS_0,
            COLUMNS_1,
            VALUE_DIM,
            COLUMNS,
            OUT_VECTOR,
            WIDE,
            REPEATS,
        )
        tl.store(
            out_rows + o1_columns[None, :],
            accumulator_1.to(out_ptr.dtype.element_ty),
            mask=row_valid[:, None] & o1_valid[None, :],
        )
