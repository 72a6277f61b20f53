"""Jitted functions that the kernels share: what a program is for, tiles, products, biases, weights, online softmax."""

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
def own_tile(table_ptr, tokens, heads, BRANCHES: tl.constexpr, BLOCK: tl.constexpr):
    """What a program is for: its tile of BLOCK tokens, its head and its map, and where the map's batch rows stand."""
    tiles = tl.cdiv(tokens, BLOCK)
    tile = tl.program_id(0) % tiles
    head = ((tl.program_id(0) // tiles) % heads).to(tl.int64)
    map_ptr = table_ptr + (tl.program_id(0) // tiles // heads) * (1 + BRANCHES)
    return tile, head, tl.load(map_ptr).to(tl.int64), map_ptr + 1


@triton.jit
def head_of(ptr, head, strides, VECTOR: tl.constexpr, HEADS_PER: tl.constexpr = 1):
    """``ptr`` at a head, of which HEADS_PER query heads share one, in the first map or batch row."""
    return ptr + head // HEADS_PER * aligned(strides[1], VECTOR)


@triton.jit
def map_of(ptr, group, head, strides, VECTOR: tl.constexpr, HEADS_PER: tl.constexpr = 1):
    """``ptr`` at a map and a head."""
    return ptr + (group * aligned(strides[0], VECTOR) + head // HEADS_PER * aligned(strides[1], VECTOR))


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
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """a @ b + accumulator in float32. PRECISION "widen" converts first: the interpreter multiplies no bfloat16."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


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
def weighted_rows(weight_ptr, rows_ptr, strides, rows, row_valid, BRANCHES: tl.constexpr):
    """Which query rows of a tile have a weight in any branch."""
    weighted = tl.zeros([rows.shape[0]], dtype=tl.int32)
    for branch in range(BRANCHES):
        weight = branch_weight(weight_ptr, rows_ptr, branch, strides[0], rows, strides[2], row_valid)
        weighted |= (weight != 0.0).to(tl.int32)
    return weighted


@triton.jit
def shares(first, second):
    """Of log-sum-exps of two parts of a row's keys, each part's share of the row; zero for a part without keys."""
    largest = finite_or_zero(tl.maximum(first, second))
    first, second = tl.exp2((first - largest) * LOG2E), tl.exp2((second - largest) * LOG2E)
    total = first + second
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    return first * inverse, second * inverse
