"""Jitted pieces of :mod:`.hopper_kernel`: the two products of a warpgroup, what follows them, and writing.

Products are in flight when the function that issues them returns.
"""

# Calls of a kernel know no unpacking, and a tuple that grows there has a new type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

# Triton 3.8 made it public.
_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def side_by_side(
    ring, TYPE: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr
):
    """The tiles of a ring of values as fewer, wider ones: wide tiles lie as narrow ones do, behind one another."""
    if _PUBLIC:
        wide = ring.reinterpret(TYPE, [TILES, ROWS, WIDTH], LAYOUT)
    else:
        wide = ring._reinterpret(TYPE, [TILES, ROWS, WIDTH], LAYOUT)
    return wide


@gluon.jit
def issue_scores(
    q_0,
    q_1,
    k_0,
    k_1,
    part: gl.constexpr,
    slot,
    HEAD_0: gl.constexpr,
    HEAD_1: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Issue Q Kᵀ for a slot of the keys: in flight when this returns."""
    scores = warpgroup_mma(
        q_0.index(part).reshape([ROWS, HEAD_0]),
        k_0.index(slot).reshape([BLOCK_N, HEAD_0]).permute((1, 0)),
        gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT),
        use_acc=False,
        is_async=True,
    )
    if HEAD_1 > 0:
        scores = warpgroup_mma(
            q_1.index(part).reshape([ROWS, HEAD_1]),
            k_1.index(slot).reshape([BLOCK_N, HEAD_1]).permute((1, 0)),
            scores,
            is_async=True,
        )
    return scores


@gluon.jit
def issue_products(
    probabilities,
    accumulators,
    values,
    slot,
    SPLIT: gl.constexpr,
    BUNDLES: gl.constexpr,
    LAYOUT_0: gl.constexpr,
    LAYOUT_1: gl.constexpr,
):
    """Issue P V for a slot of the values, added to the accumulators: in flight when this returns."""
    operand = gl.convert_layout(probabilities, gl.DotOperandLayout(0, LAYOUT_0, 2))
    products = ()
    for bundle in gl.static_range(BUNDLES):
        v = values[0].index(slot * BUNDLES + bundle)
        products = products + (warpgroup_mma(operand, v, accumulators[bundle], is_async=True),)
    if SPLIT:
        operand_1 = gl.convert_layout(probabilities, gl.DotOperandLayout(0, LAYOUT_1, 2))
        for bundle in gl.static_range(BUNDLES):
            v = values[1].index(slot * BUNDLES + bundle)
            products = products + (warpgroup_mma(operand_1, v, accumulators[BUNDLES + bundle], is_async=True),)
    return products


@gluon.jit
def finished(products, PRODUCTS: gl.constexpr):
    """Wait for everything in flight; the accumulators."""
    if PRODUCTS == 1:
        # One is returned as it is, several as a tuple.
        finished = (warpgroup_mma_wait(0, deps=products),)
    else:
        finished = warpgroup_mma_wait(0, deps=products)
    return finished


@gluon.jit
def sums_of_threads(tile, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """[ROWS, 4]: of each row, what each of the four threads that hold it adds up by itself, without a shuffle.

    A thread holds two neighbours of every eight columns of a product.
    """
    return gl.convert_layout(gl.sum(gl.sum(tile.reshape([ROWS, COLUMNS // 8, 4, 2]), 3), 1), LAYOUT)


@gluon.jit
def rescaled_rows(
    accumulators,
    factor,
    SPLIT: gl.constexpr,
    BUNDLES: gl.constexpr,
    LAYOUT_0: gl.constexpr,
    LAYOUT_1: gl.constexpr,
):
    """Every row of the accumulators times its entry of ``factor``."""
    factor_0 = gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT_0))[:, None]
    rescaled = ()
    for bundle in gl.static_range(BUNDLES):
        rescaled = rescaled + (accumulators[bundle] * factor_0,)
    if SPLIT:
        factor_1 = gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT_1))[:, None]
        for bundle in gl.static_range(BUNDLES):
            rescaled = rescaled + (accumulators[BUNDLES + bundle] * factor_1,)
    return rescaled


@gluon.jit
def write(
    accumulator,
    out_ptr,
    where,
    before: gl.constexpr,
    ROWS: gl.constexpr,
    START: gl.constexpr,
    WIDTH: gl.constexpr,
    BUNDLE: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    VECTOR: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Columns START .. START + WIDTH of the BUNDLE branches after ``before``.

    ``where``: a pointer to their batch rows, the first query row, the queries, strides of batch rows, queries, columns.
    VECTOR neighbours, which a thread holds, lie side by side and start aligned; the compiler cannot see that.
    """
    rows_ptr, first_row, queries, stride_b, stride_n, stride_e = where
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, BUNDLE * WIDTH, gl.SliceLayout(0, LAYOUT))
    entry = START + column % WIDTH
    valid = entry // VECTOR * VECTOR < VALUE_DIM
    branches = gl.zeros([BUNDLE * WIDTH], gl.int64, gl.SliceLayout(0, LAYOUT))
    for branch in gl.static_range(BUNDLE):
        row = gl.load(rows_ptr + before + branch)
        mine = column // WIDTH == branch
        branches = gl.where(mine, row.to(gl.int64) * stride_b, branches)
        if before + branch > 0:
            # A branch that names the row before it again is there to make the launch wide enough.
            valid = valid & ((gl.load(rows_ptr + before + branch - 1) != row) | (column // WIDTH != branch))
    # Added before they are multiplied, so that no product of the rows alone is held in registers from tile to tile.
    offsets = (branches + entry * stride_e)[None, :] + (first_row + rows).to(gl.int64)[:, None] * stride_n
    if VECTOR > 1:
        offsets = gl.max_contiguous(gl.multiple_of(offsets, [1, VECTOR]), [1, VECTOR])
        valid = gl.max_constancy(valid, [VECTOR])
    gl.store(
        out_ptr + offsets,
        accumulator.to(out_ptr.dtype.element_ty),
        mask=(rows < queries - first_row)[:, None] & valid[None, :],
    )
