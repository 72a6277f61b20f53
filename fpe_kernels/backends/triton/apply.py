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

from .pieces import (
    add_products,
    head_columns,
    load_pieces,
    packed_columns,
    scaled_rows,
    split_scores,
    store_columns,
    take_up,
    weigh_rows,
    zero_pieces,
)
from .primitives import (
    LN2,
    LOG2E,
    add_bias,
    aligned,
    finite_or_zero,
    head_of,
    map_of,
    online_softmax_update,
    own_tile,
    tile_index,
    weighted_rows,
)


@triton.jit
def apply_kernel(
    query_ptr,  # [G, H, N, D]
    key_ptr,  # [G, H, M, D]
    value_ptr,  # [B, H, M, E]
    bias_ptr,  # [G, H, N, M], strides 0 where it is broadcast; or None
    out_ptr,  # [B, H, N, E]
    logsumexp_ptr,  # [G, H, N], contiguous
    row_weight_ptr,  # [B, H, N], strides 0 where it is broadcast; or None
    prior_ptr,  # [B, H, N, E], float32, with the strides of out: the product over other keys; or None
    prior_logsumexp_ptr,  # [B, H, N], contiguous: the log-sum-exp over those
    table_ptr,  # [programs' groups, 1 + BRANCHES]: the map, then its batch rows
    lengths_ptr,  # [G]: the keys of each map; or None
    tokens,  # queries, keys; the order of the numbers is worth registers: decision 0007
    query_strides,
    key_strides,
    value_strides,
    heads,
    out_strides,
    bias_strides,
    row_weight_strides,
    scale,  # of the scores, times log2(e)
    HEAD: tl.constexpr,  # widths of a head
    COLUMNS: tl.constexpr,  # widths of the packed columns
    BRANCHES: tl.constexpr,
    VECTORS: tl.constexpr,  # of query, key, value, out
    SHARING: tl.constexpr,  # query heads that share a head of key, of value
    BLOCK: tl.constexpr,  # queries, keys
    EVEN: tl.constexpr,  # whether tiles of queries, of keys, are whole
    KNOWN: tl.constexpr,
    BIAS_VARIES: tl.constexpr,
    SKIPS: tl.constexpr,
    REPEATS: tl.constexpr,
    PRESCALE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BLOCK[0]
    BLOCK_N: tl.constexpr = BLOCK[1]
    queries, keys = tokens
    tile, head, group, rows_ptr = own_tile(table_ptr, queries, heads, BRANCHES, BLOCK_M)
    if lengths_ptr is not None:
        keys = tl.load(lengths_ptr + group)
    query_ptr = map_of(query_ptr, group, head, query_strides, VECTORS[0])
    key_ptr = map_of(key_ptr, group, head, key_strides, VECTORS[1], SHARING[0])
    value_ptr = head_of(value_ptr, head, value_strides, VECTORS[2], SHARING[1])
    out_ptr = head_of(out_ptr, head, out_strides, VECTORS[3])
    query_stride, key_stride = aligned(query_strides[2], VECTORS[0]), aligned(key_strides[2], VECTORS[1])
    value_stride, out_stride = aligned(value_strides[2], VECTORS[2]), aligned(out_strides[2], VECTORS[3])
    logsumexp_ptr += (group * heads + head) * queries

    start_m = tile.to(tl.int64) * BLOCK_M
    rows, columns = tile_index(BLOCK_M, WIDE), tile_index(BLOCK_N, WIDE)
    rows_end = queries - start_m
    row_valid = rows < rows_end
    query_ptr += start_m * query_stride
    query_columns = head_columns(query_strides[3], HEAD, WIDE)
    q = load_pieces(query_ptr, rows, query_stride, query_columns, rows_end, HEAD, EVEN[0])
    key_columns = head_columns(key_strides[3], HEAD, WIDE)
    value_columns = packed_columns(rows_ptr, value_strides, COLUMNS, BRANCHES, VECTORS[2], WIDE)
    accumulators = zero_pieces(BLOCK_M, COLUMNS)
    if bias_ptr is not None:
        bias_ptr += group * bias_strides[0] + head * bias_strides[1] + start_m * bias_strides[2]
    if KNOWN:
        shift = finite_or_zero(tl.load(logsumexp_ptr + start_m + rows, mask=row_valid, other=0.0)) * LOG2E
    else:
        maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        normaliser = tl.zeros([BLOCK_M], dtype=tl.float32)

    keys_stop = keys
    if row_weight_ptr is not None:
        row_weight_ptr += head * row_weight_strides[1] + start_m * row_weight_strides[2]
    if SKIPS:
        weighted = weighted_rows(row_weight_ptr, rows_ptr, row_weight_strides, rows, row_valid, BRANCHES)
        keys_stop = keys * tl.max(weighted, 0)

    # A positive scale commutes with the maximum, so it folds into the exponent's multiply-add.
    factor = scale
    if PRESCALE:
        factor = 1.0
    for start_n in range(0, keys_stop, BLOCK_N):
        keys_end = keys - start_n
        start = tl.cast(start_n, tl.int64)
        k = load_pieces(key_ptr + start * key_stride, columns, key_stride, key_columns, keys_end, HEAD, EVEN[1])
        scores = split_scores(q, k, PRECISION)
        if PRESCALE:
            scores *= scale
        if bias_ptr is not None:
            scores = add_bias(
                scores,
                bias_ptr + start * bias_strides[3],
                rows,
                columns,
                bias_strides[2],
                bias_strides[3],
                rows_end,
                keys_end,
                BIAS_VARIES,
                EVEN[0] and EVEN[1],
            )
        if not EVEN[1]:
            scores = tl.where((columns < keys_end)[None, :], scores, float("-inf"))
        if KNOWN:
            probabilities = tl.exp2(scores * factor - shift[:, None])
        else:
            probabilities, rescale, maximum, normaliser = online_softmax_update(
                scores, factor, maximum, normaliser, bias_ptr is not None
            )
            accumulators = scaled_rows(accumulators, rescale)
        v_ptr = value_ptr + start * value_stride
        accumulators = add_products(
            accumulators,
            probabilities,
            v_ptr,
            columns,
            value_stride,
            value_columns,
            keys_end,
            COLUMNS,
            EVEN[1],
            PRECISION,
        )

    if not KNOWN:
        logsumexp = (maximum + tl.log2(normaliser)) * LN2
        if SKIPS:
            logsumexp = tl.where(keys_stop > 0, logsumexp, float("inf"))
        tl.store(logsumexp_ptr + start_m + rows, logsumexp, mask=row_valid)
        accumulators = scaled_rows(accumulators, 1.0 / tl.where(normaliser == 0.0, 1.0, normaliser))
    if prior_ptr is not None:
        if KNOWN:
            logsumexp = tl.load(logsumexp_ptr + start_m + rows, mask=row_valid, other=0.0)
        prior_rows = head_of(prior_ptr, head, out_strides, VECTORS[3]) + (start_m + rows)[:, None] * out_stride
        prior_logsumexp_ptr += head * queries + start_m
        accumulators = take_up(
            accumulators,
            logsumexp,
            prior_rows,
            prior_logsumexp_ptr,
            rows_ptr,
            rows,
            row_valid,
            heads * queries,
            out_strides,
            COLUMNS,
            BRANCHES,
            VECTORS[3],
            WIDE,
        )
    if row_weight_ptr is not None:
        accumulators = weigh_rows(
            accumulators, row_weight_ptr, rows_ptr, row_weight_strides, rows, row_valid, COLUMNS, BRANCHES
        )
    out_ptr += start_m * out_stride
    store_columns(
        out_ptr,
        accumulators,
        rows_ptr,
        rows,
        row_valid,
        out_stride,
        out_strides,
        COLUMNS,
        BRANCHES,
        VECTORS[3],
        WIDE,
        REPEATS,
    )
