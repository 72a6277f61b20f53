"""Jitted pieces that the kernels share: tiles of split width, packed columns, scores, online softmax.

Tiles must be powers of two, sums of tiles need not: a width is held in two pieces, 160 = 128 + 32, and the second may
be absent (width 0), which costs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def aligned(stride, VECTOR: tl.constexpr):
    """``stride``, visibly a multiple of VECTOR: the compiler is told of multiples of 16 only, and 40 is none."""
    return stride // VECTOR * VECTOR


@triton.jit
def tile_index(LENGTH: tl.constexpr, WIDE: tl.constexpr):
    """0 .. LENGTH, in int64 where offsets inside a tile may pass 2³¹; int32 keeps registers free."""
    index = tl.arange(0, LENGTH)
    if WIDE:
        index = index.to(tl.int64)
    return index


@triton.jit
def load_tile(
    ptr, rows, row_stride, columns, row_end, column_valid, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr
):
    """ptr[rows, columns], zero outside; ``columns`` are element offsets. Unneeded masks are not compiled."""
    ptrs = ptr + rows[:, None] * row_stride + columns[None, :]
    if EVEN_ROWS and EVEN_COLUMNS:
        return tl.load(ptrs)
    if EVEN_ROWS:
        return tl.load(ptrs, mask=column_valid[None, :], other=0.0)
    if EVEN_COLUMNS:
        return tl.load(ptrs, mask=(rows < row_end)[:, None], other=0.0)
    return tl.load(ptrs, mask=(rows < row_end)[:, None] & column_valid[None, :], other=0.0)


@triton.jit
def head_columns(stride, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr = False):
    """Offsets and validity of the head-dim entries START .. START + WIDTH."""
    entry = START + tile_index(WIDTH, WIDE)
    return entry * stride, entry < HEAD_DIM


@triton.jit
def packed_columns(
    rows_ptr,
    batch_stride,
    entry_stride,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ONCE: tl.constexpr = False,
):
    """Offsets and validity of packed columns: column c is entry ``c % VALUE_DIM`` of branch ``c // VALUE_DIM``.

    ``rows_ptr`` holds the batch row of each branch; ONCE leaves out branches that name the row before them again.
    VECTOR neighbours lie side by side in memory and start aligned; the compiler cannot see that through the table, and
    without it a copy would move two bytes at a time.
    """
    column = START + tl.arange(0, WIDTH)
    valid = column < COLUMNS
    row = tl.load(rows_ptr + column // VALUE_DIM, mask=valid, other=0)
    entry = column % VALUE_DIM
    if ONCE:
        later = valid & (column >= VALUE_DIM)
        valid = valid & (tl.load(rows_ptr + column // VALUE_DIM - 1, mask=later, other=-1) != row)
        valid = tl.max_constancy(valid, VECTOR)
    if WIDE:
        row, entry = row.to(tl.int64), entry.to(tl.int64)
    offset = row * batch_stride + entry * entry_stride
    if VECTOR > 1:
        offset = tl.max_contiguous(tl.multiple_of(offset, VECTOR), VECTOR)
    return offset, valid


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """a @ b + accumulator in float32. PRECISION "widen" converts first: the interpreter multiplies no bfloat16."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def split_scores(a0, a1, b0, b1, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b.T for tiles whose shared axis is held in two pieces; the second counts where SPLIT."""
    product = dot(a0, tl.trans(b0), tl.zeros([a0.shape[0], b0.shape[0]], dtype=tl.float32), PRECISION)
    if SPLIT:
        product = dot(a1, tl.trans(b1), product, PRECISION)
    return product


@triton.jit
def add_bias(
    scores,
    bias_ptr,
    rows,
    columns,
    row_stride,
    column_stride,
    rows_end,
    columns_end,
    VARIES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Base-2 scores plus a tile of bias in natural-log units; ``bias_ptr`` points at the tile.

    VARIES says over which axes of the tile the bias differs, "rows", "columns" or "both": a padding mask is a vector.
    Offsets are made anew for every tile: held pointers would take half of the registers.
    """
    if VARIES == "rows":
        bias = tl.load(bias_ptr + rows * row_stride, mask=rows < rows_end, other=0.0)[:, None]
    elif VARIES == "columns":
        bias = tl.load(bias_ptr + columns * column_stride, mask=columns < columns_end, other=0.0)[None, :]
    else:
        ptrs = bias_ptr + rows[:, None] * row_stride + columns[None, :] * column_stride
        if EVEN:
            bias = tl.load(ptrs)
        else:
            bias = tl.load(ptrs, mask=(rows < rows_end)[:, None] & (columns < columns_end)[None, :], other=0.0)
    return scores + bias.to(tl.float32) * LOG2E


@triton.jit
def finite_or_zero(x):
    """-inf becomes 0: the statistics of rows that are masked throughout."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def online_softmax_update(scores, factor, maximum, normaliser, MASKED: tl.constexpr):
    """One step of the online softmax (Milakov and Gimelshein, 2018) on base-2 scores ``scores * factor``, factor > 0.

    Returns the unnormalised probabilities of this tile, the factor that rescales what was accumulated before, and the
    new statistics. MASKED says that a row may hold nothing but -inf so far.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * factor)
    if MASKED:
        shift = finite_or_zero(new_maximum)
    else:
        shift = new_maximum
    probabilities = tl.exp2(scores * factor - shift[:, None])
    rescale = tl.exp2(maximum - shift)
    return probabilities, rescale, new_maximum, normaliser * rescale + tl.sum(probabilities, 1)


@triton.jit
def branch_weight(weight_ptr, rows_ptr, branch, batch_stride, rows, row_stride, row_valid):
    """The weights of a tile's query rows in one branch; ``weight_ptr`` points at the tile in batch row 0."""
    row = tl.load(rows_ptr + branch).to(tl.int64)
    return tl.load(weight_ptr + row * batch_stride + rows * row_stride, mask=row_valid, other=0.0).to(tl.float32)


@triton.jit
def shares(first, second):
    """Of log-sum-exps of two parts of a row's keys, each part's share of the row; zero for a part without keys."""
    largest = finite_or_zero(tl.maximum(first, second))
    first, second = tl.exp2((first - largest) * LOG2E), tl.exp2((second - largest) * LOG2E)
    total = first + second
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    return first * inverse, second * inverse


@triton.jit
def weigh(accumulator, weight, branch, START: tl.constexpr, VALUE_DIM: tl.constexpr, BRANCHES: tl.constexpr):
    """``accumulator`` with the packed columns of ``branch`` times ``weight``, which has one number for each row."""
    if BRANCHES == 1:
        return accumulator * weight[:, None]
    owner = (START + tl.arange(0, accumulator.shape[1])) // VALUE_DIM
    return accumulator * tl.where((owner == branch)[None, :], weight[:, None], 1.0)


@triton.jit
def take_up(
    accumulator,  # [BLOCK_M, WIDTH], normalised over the keys of this launch
    logsumexp,  # over those
    prior_rows,  # pointers to the rows of the other product, in batch row 0
    prior_logsumexp_ptr,
    rows_ptr,
    statistics_stride_b,
    rows,
    row_valid,
    stride_b,
    stride_e,
    START: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BRANCHES: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A piece of the accumulators merged with the product over other keys, both normalised together."""
    WIDTH: tl.constexpr = accumulator.shape[1]
    columns, valid = packed_columns(
        rows_ptr, stride_b, stride_e, START, WIDTH, VALUE_DIM, BRANCHES * VALUE_DIM, VECTOR, WIDE
    )
    prior = tl.load(prior_rows + columns[None, :], mask=row_valid[:, None] & valid[None, :], other=0.0)
    for branch in range(BRANCHES):
        known = branch_weight(prior_logsumexp_ptr, rows_ptr, branch, statistics_stride_b, rows, 1, row_valid)
        own, other = shares(logsumexp, known)
        accumulator = weigh(accumulator, own, branch, START, VALUE_DIM, BRANCHES)
        prior = weigh(prior, other, branch, START, VALUE_DIM, BRANCHES)
    return accumulator + prior
