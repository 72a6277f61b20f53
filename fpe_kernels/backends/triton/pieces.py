"""Jitted functions of tiles whose width is held in pieces, and of the columns that are packed in such a tile.

Tiles must be powers of two, sums of tiles need not: a width is held in one piece or two, 160 = 128 + 32, and what is so
held is a tuple. A kernel knows a width as a tuple of numbers, WIDTHS: the columns that there are, then the width of
each piece, as :func:`.packing.widths` makes it. Triton 3.6 knows neither tuples in such tuples nor a star before one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import branch_weight, dot, load_tile, shares, tile_index


@triton.jit
def head_piece(stride, WIDTHS: tl.constexpr, PIECE: tl.constexpr, WIDE: tl.constexpr):
    """Offsets and validity of the entries of a head in one piece."""
    START: tl.constexpr = WIDTHS[1] if PIECE == 1 else 0
    WIDTH: tl.constexpr = WIDTHS[1 + PIECE]
    entry = START + tile_index(WIDTH, WIDE)
    return entry * stride, entry < WIDTHS[0]


@triton.jit
def head_columns(stride, WIDTHS: tl.constexpr, WIDE: tl.constexpr):
    """Of each piece of a head, the offsets and validity of its entries."""
    pieces = ()
    for piece in tl.static_range(len(WIDTHS) - 1):
        pieces = pieces + (head_piece(stride, WIDTHS, piece, WIDE),)
    return pieces


@triton.jit
def packed_piece(
    rows_ptr,
    strides,
    WIDTHS: tl.constexpr,
    BRANCHES: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ONCE: tl.constexpr,
):
    """Offsets and validity of packed columns: column c is entry ``c % VALUE_DIM`` of branch ``c // VALUE_DIM``.

    ``rows_ptr`` holds the batch row of each branch; ONCE leaves out branches that name the row before them again.
    VECTOR neighbours lie side by side in memory and start aligned; the compiler cannot see that through the table, and
    without it a copy would move two bytes at a time.
    """
    VALUE_DIM: tl.constexpr = WIDTHS[0] // BRANCHES
    START: tl.constexpr = WIDTHS[1] if PIECE == 1 else 0
    WIDTH: tl.constexpr = WIDTHS[1 + PIECE]
    column = START + tl.arange(0, WIDTH)
    valid = column < WIDTHS[0]
    row = tl.load(rows_ptr + column // VALUE_DIM, mask=valid, other=0)
    entry = column % VALUE_DIM
    if ONCE:
        later = valid & (column >= VALUE_DIM)
        valid = valid & (tl.load(rows_ptr + column // VALUE_DIM - 1, mask=later, other=-1) != row)
        valid = tl.max_constancy(valid, VECTOR)
    if WIDE:
        row, entry = row.to(tl.int64), entry.to(tl.int64)
    offset = row * strides[0] + entry * strides[3]
    if VECTOR > 1:
        offset = tl.max_contiguous(tl.multiple_of(offset, VECTOR), VECTOR)
    return offset, valid


@triton.jit
def packed_columns(
    rows_ptr,
    strides,
    WIDTHS: tl.constexpr,
    BRANCHES: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ONCE: tl.constexpr = False,
):
    """Of each piece of the packed columns, their offsets and validity."""
    pieces = ()
    for piece in tl.static_range(len(WIDTHS) - 1):
        pieces = pieces + (packed_piece(rows_ptr, strides, WIDTHS, BRANCHES, piece, VECTOR, WIDE, ONCE),)
    return pieces


@triton.jit
def load_piece(
    ptr, rows, row_stride, columns, rows_end, WIDTHS: tl.constexpr, PIECE: tl.constexpr, EVEN_ROWS: tl.constexpr
):
    """One piece of the tile ptr[rows, columns]."""
    END: tl.constexpr = WIDTHS[1] + (WIDTHS[2] if PIECE == 1 else 0)
    EVEN: tl.constexpr = WIDTHS[0] >= END
    return load_tile(ptr, rows, row_stride, columns[PIECE][0], rows_end, columns[PIECE][1], EVEN_ROWS, EVEN)


@triton.jit
def load_pieces(ptr, rows, row_stride, columns, rows_end, WIDTHS: tl.constexpr, EVEN_ROWS: tl.constexpr):
    """The tile ptr[rows, columns] in its pieces, zero outside."""
    pieces = ()
    for piece in tl.static_range(len(WIDTHS) - 1):
        pieces = pieces + (load_piece(ptr, rows, row_stride, columns, rows_end, WIDTHS, piece, EVEN_ROWS),)
    return pieces


@triton.jit
def zero_piece(ROWS: tl.constexpr, WIDTHS: tl.constexpr, PIECE: tl.constexpr):
    WIDTH: tl.constexpr = WIDTHS[1 + PIECE]
    return tl.zeros([ROWS, WIDTH], dtype=tl.float32)


@triton.jit
def zero_pieces(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """Accumulators of ROWS rows."""
    pieces = ()
    for piece in tl.static_range(len(WIDTHS) - 1):
        pieces = pieces + (zero_piece(ROWS, WIDTHS, piece),)
    return pieces


@triton.jit
def scaled_rows(pieces, factor):
    """Every piece with a factor for each of its rows."""
    scaled = ()
    for piece in tl.static_range(len(pieces)):
        scaled = scaled + (pieces[piece] * factor[:, None],)
    return scaled


@triton.jit
def split_scores(a, b, PRECISION: tl.constexpr):
    """a @ b.T for tiles whose shared axis is held in pieces."""
    product = dot(a[0], tl.trans(b[0]), tl.zeros([a[0].shape[0], b[0].shape[0]], dtype=tl.float32), PRECISION)
    if len(a) == 2:
        product = dot(a[1], tl.trans(b[1]), product, PRECISION)
    return product


@triton.jit
def add_products(
    accumulators,
    left,
    ptr,
    rows,
    row_stride,
    columns,
    rows_end,
    WIDTHS: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """accumulators + left @ ptr[rows, columns], piece by piece."""
    sums = ()
    for piece in tl.static_range(len(WIDTHS) - 1):
        right = load_piece(ptr, rows, row_stride, columns, rows_end, WIDTHS, piece, EVEN_ROWS)
        sums = sums + (dot(left.to(right.dtype), right, accumulators[piece], PRECISION),)
    return sums


@triton.jit
def add_to_pieces(accumulators, left, right, PRECISION: tl.constexpr):
    """accumulators + left @ right."""
    sums = ()
    for piece in tl.static_range(len(right)):
        sums = sums + (dot(left, right[piece], accumulators[piece], PRECISION),)
    return sums


@triton.jit
def store_columns(
    ptr,
    accumulators,
    rows_ptr,
    rows,
    row_valid,
    row_stride,
    strides,
    WIDTHS: tl.constexpr,
    BRANCHES: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ONCE: tl.constexpr = False,
):
    """Write packed columns to the batch rows that they are of, at a tile to which ``ptr`` points."""
    row_ptrs = ptr + rows[:, None] * row_stride
    for piece in tl.static_range(len(WIDTHS) - 1):
        columns, valid = packed_piece(rows_ptr, strides, WIDTHS, BRANCHES, piece, VECTOR, WIDE, ONCE)
        tl.store(
            row_ptrs + columns[None, :],
            accumulators[piece].to(ptr.dtype.element_ty),
            mask=row_valid[:, None] & valid[None, :],
        )


@triton.jit
def weigh(accumulator, weight, branch, WIDTHS: tl.constexpr, BRANCHES: tl.constexpr, PIECE: tl.constexpr):
    """``accumulator`` with the packed columns of ``branch`` times ``weight``, which has one number for each row."""
    if BRANCHES == 1:
        return accumulator * weight[:, None]
    VALUE_DIM: tl.constexpr = WIDTHS[0] // BRANCHES
    START: tl.constexpr = WIDTHS[1] if PIECE == 1 else 0
    owner = (START + tl.arange(0, accumulator.shape[1])) // VALUE_DIM
    return accumulator * tl.where((owner == branch)[None, :], weight[:, None], 1.0)


@triton.jit
def weigh_pieces(accumulators, weight, branch, WIDTHS: tl.constexpr, BRANCHES: tl.constexpr):
    """:func:`weigh` of every piece."""
    weighed = ()
    for piece in tl.static_range(len(WIDTHS) - 1):
        weighed = weighed + (weigh(accumulators[piece], weight, branch, WIDTHS, BRANCHES, piece),)
    return weighed


@triton.jit
def weigh_rows(
    accumulators, weight_ptr, rows_ptr, strides, rows, row_valid, WIDTHS: tl.constexpr, BRANCHES: tl.constexpr
):
    """The packed columns of every branch times the weights of its query rows; ``weight_ptr`` points at the tile."""
    for branch in range(BRANCHES):
        weight = branch_weight(weight_ptr, rows_ptr, branch, strides[0], rows, strides[2], row_valid)
        accumulators = weigh_pieces(accumulators, weight, branch, WIDTHS, BRANCHES)
    return accumulators


@triton.jit
def take_up_piece(
    accumulator,
    logsumexp,
    prior_rows,
    prior_logsumexp_ptr,
    rows_ptr,
    rows,
    row_valid,
    statistics_stride,
    strides,
    WIDTHS: tl.constexpr,
    BRANCHES: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    columns, valid = packed_piece(rows_ptr, strides, WIDTHS, BRANCHES, PIECE, VECTOR, WIDE, False)
    prior = tl.load(prior_rows + columns[None, :], mask=row_valid[:, None] & valid[None, :], other=0.0)
    for branch in range(BRANCHES):
        known = branch_weight(prior_logsumexp_ptr, rows_ptr, branch, statistics_stride, rows, 1, row_valid)
        own, other = shares(logsumexp, known)
        accumulator = weigh(accumulator, own, branch, WIDTHS, BRANCHES, PIECE)
        prior = weigh(prior, other, branch, WIDTHS, BRANCHES, PIECE)
    return accumulator + prior


@triton.jit
def take_up(
    accumulators,  # normalised over the keys of this launch
    logsumexp,  # over those
    prior_rows,  # pointers to the rows of the other product, in batch row 0
    prior_logsumexp_ptr,
    rows_ptr,
    rows,
    row_valid,
    statistics_stride,
    strides,
    WIDTHS: tl.constexpr,
    BRANCHES: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The accumulators merged with the product over other keys, both normalised together."""
    merged = ()
    for piece in tl.static_range(len(WIDTHS) - 1):
        part = take_up_piece(
            accumulators[piece],
            logsumexp,
            prior_rows,
            prior_logsumexp_ptr,
            rows_ptr,
            rows,
            row_valid,
            statistics_stride,
            strides,
            WIDTHS,
            BRANCHES,
            piece,
            VECTOR,
            WIDE,
        )
        merged = merged + (part,)
    return merged
