"""Gradients of query and key from a known log-sum-exp, for ``apply`` and ``adjoint`` alike.

    dS_g = A_g ∘ (Σ_b X_b Y_bᵀ − δ_g),   dQ_g = scale · dS_g K_g,   dK_g = scale · dS_gᵀ Q_g

One kernel computes either: a program owns a tile of one token axis and streams the other. For dQ it owns queries and
the statistics belong to its rows; for dK it owns keys and they belong to the streamed columns. X and Y of batch rows
that share a map stand side by side, so one product is the sum over them. Every output is written by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import add_to_pieces, head_columns, head_piece, load_pieces, packed_columns, split_scores, zero_pieces
from .primitives import LOG2E, add_bias, aligned, finite_or_zero, head_of, map_of, own_tile, tile_index


@triton.jit
def gradient_kernel(
    own_ptr,  # [G, H, T, D]: queries for dQ, keys for dK
    other_ptr,  # [G, H, S, D]: the other axis
    own_factor_ptr,  # [B, H, T, E]: X for dQ, Y for dK
    other_factor_ptr,  # [B, H, S, E]
    bias_ptr,  # [G, H, T, S], strides 0 where it is broadcast; or None
    gradient_ptr,  # [G, H, T, D]
    logsumexp_ptr,  # [G, H, N], contiguous
    delta_ptr,  # [G, H, N], contiguous
    table_ptr,  # [programs' groups, 1 + BRANCHES]: the map, then its batch rows
    lengths_ptr,  # [G]: the keys of each map; or None
    tokens,  # own, other; the order of the numbers is worth registers: decision 0007
    own_strides,
    other_strides,
    own_factor_strides,
    other_factor_strides,
    scale,
    gradient_strides,
    bias_strides,
    heads,
    HEAD: tl.constexpr,  # widths of a head
    COLUMNS: tl.constexpr,  # widths of the packed columns
    BRANCHES: tl.constexpr,
    VECTORS: tl.constexpr,  # of own, other, own_factor, other_factor
    SHARING: tl.constexpr,  # query heads that share a head of those
    BLOCK: tl.constexpr,  # own tokens, other tokens
    EVEN: tl.constexpr,  # whether tiles of those are whole
    OWN_STATISTICS: tl.constexpr,
    FIRST: tl.constexpr,
    BIAS_VARIES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BLOCK[0]
    BLOCK_N: tl.constexpr = BLOCK[1]
    owns, others = tokens
    tile, head, group, rows_ptr = own_tile(table_ptr, owns, heads, BRANCHES, BLOCK_M)
    own_stride, other_stride = aligned(own_strides[2], VECTORS[0]), aligned(other_strides[2], VECTORS[1])
    x_stride, y_stride = aligned(own_factor_strides[2], VECTORS[2]), aligned(other_factor_strides[2], VECTORS[3])
    start_m = tile.to(tl.int64) * BLOCK_M
    own_ptr = map_of(own_ptr, group, head, own_strides, VECTORS[0], SHARING[0]) + start_m * own_stride
    other_ptr = map_of(other_ptr, group, head, other_strides, VECTORS[1], SHARING[1])
    x_ptr = head_of(own_factor_ptr, head, own_factor_strides, VECTORS[2], SHARING[2]) + start_m * x_stride
    other_factor_ptr = head_of(other_factor_ptr, head, other_factor_strides, VECTORS[3], SHARING[3])
    gradient_ptr += group * gradient_strides[0] + head * gradient_strides[1] + start_m * gradient_strides[2]
    statistics = owns if OWN_STATISTICS else others
    logsumexp_ptr += (group * heads + head) * statistics
    delta_ptr += (group * heads + head) * statistics

    rows, columns = tile_index(BLOCK_M, WIDE), tile_index(BLOCK_N, WIDE)
    rows_end = owns - start_m
    row_valid = rows < rows_end
    others_stop = others
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + group)
        if OWN_STATISTICS:
            others = length
            others_stop = length
        else:
            # Gradients of keys past the length are written, and are zero.
            rows_end = length - start_m
            others_stop = others * (rows_end > 0).to(tl.int32)
    own_columns = head_columns(own_strides[3], HEAD, WIDE)
    a = load_pieces(own_ptr, rows, own_stride, own_columns, rows_end, HEAD, EVEN[0])
    other_columns = head_columns(other_strides[3], HEAD, WIDE)
    gradients = zero_pieces(BLOCK_M, HEAD)
    x_columns = packed_columns(rows_ptr, own_factor_strides, COLUMNS, BRANCHES, VECTORS[2], WIDE)
    x = load_pieces(x_ptr, rows, x_stride, x_columns, rows_end, COLUMNS, EVEN[0])
    y_columns = packed_columns(rows_ptr, other_factor_strides, COLUMNS, BRANCHES, VECTORS[3], WIDE)
    if bias_ptr is not None:
        bias_ptr += group * bias_strides[0] + head * bias_strides[1] + start_m * bias_strides[2]
    if OWN_STATISTICS:
        shift = finite_or_zero(tl.load(logsumexp_ptr + start_m + rows, mask=row_valid, other=0.0))[:, None] * LOG2E
        if FIRST:
            delta = tl.load(delta_ptr + start_m + rows, mask=row_valid, other=0.0)[:, None]

    for start_n in range(0, others_stop, BLOCK_N):
        columns_end = others - start_n
        column_valid = columns < columns_end
        start = tl.cast(start_n, tl.int64)
        b_ptr = other_ptr + start * other_stride
        b = load_pieces(b_ptr, columns, other_stride, other_columns, columns_end, HEAD, EVEN[1])
        y_ptr = other_factor_ptr + start * y_stride
        y = load_pieces(y_ptr, columns, y_stride, y_columns, columns_end, COLUMNS, EVEN[1])
        scores = split_scores(a, b, PRECISION) * (scale * LOG2E)
        if bias_ptr is not None:
            scores = add_bias(
                scores,
                bias_ptr + start * bias_strides[3],
                rows,
                columns,
                bias_strides[2],
                bias_strides[3],
                rows_end,
                columns_end,
                BIAS_VARIES,
                EVEN[0] and EVEN[1],
            )
        if not OWN_STATISTICS:
            # exp(S − inf) = 0: streamed tokens past the end give nothing.
            known = tl.load(logsumexp_ptr + start_n + columns, mask=column_valid, other=float("inf"))
            shift = finite_or_zero(known)[None, :] * LOG2E
            if FIRST:
                delta = tl.load(delta_ptr + start_n + columns, mask=column_valid, other=0.0)[None, :]
            if lengths_ptr is not None:
                scores = tl.where((rows < rows_end)[:, None], scores, float("-inf"))
        elif not EVEN[1]:
            scores = tl.where(column_valid[None, :], scores, float("-inf"))
        probabilities = tl.exp2(scores - shift)
        outer = split_scores(x, y, PRECISION)
        if FIRST:
            outer -= delta
        gradients = add_to_pieces(gradients, (probabilities * outer).to(b[0].dtype), b, PRECISION)
    store_gradients(
        gradient_ptr, gradients, scale, rows, row_valid, gradient_strides[2], gradient_strides[3], HEAD, FIRST
    )


@triton.jit
def store_gradients(
    ptr, gradients, scale, rows, row_valid, row_stride, entry_stride, HEAD: tl.constexpr, FIRST: tl.constexpr
):
    """Write ``scale`` times the gradient; chunks after the first add to what their forerunner wrote."""
    for piece in tl.static_range(len(HEAD) - 1):
        gradient = gradients[piece] * scale
        columns, valid = head_piece(entry_stride, HEAD, piece, False)
        ptrs = ptr + rows[:, None] * row_stride + columns[None, :]
        mask = row_valid[:, None] & valid[None, :]
        if not FIRST:
            gradient += tl.load(ptrs, mask=mask, other=0.0)
        tl.store(ptrs, gradient.to(ptr.dtype.element_ty), mask=mask)
