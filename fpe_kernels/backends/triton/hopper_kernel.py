"""Forward on Hopper, written in Gluon: a warp that fetches, warpgroups that multiply while they exponentiate.

    O_b = softmax(scale · Q_g K_gᵀ) V_b     for every batch row b with map_index[b] = g

A program holds a tile of 64 or 128 query rows a warpgroup and streams tiles of keys and values through two rings in
shared memory, which the bulk copy engine fills. There are as many programs as run at the same time, each of which takes
tile after tile (:mod:`.hopper_fetch`): while one tile's output is written, the next one's operands come. Of each ring's
slot a barrier says that it is full (the bytes have come) and another that it is empty (every warpgroup has read it). A
slot is in use for the ``t``-th time in phase ``t % 2`` of its barriers.

The order of a warpgroup is that of FlashAttention-3 (Shah et al., 2024): S(j) = Q K(j)ᵀ is issued, then P(j−1) V(j−1)
behind it; S(j) alone is waited for, its exponentials are taken while the second product runs, and only then are the
accumulators touched. With TURNS the warpgroups issue in turns, so that one takes its exponentials while the other's
products run; otherwise nothing keeps them from running in step. The sum of a row stays dealt out among the four threads
that hold the row until the last tile is read, so that no tile has to shuffle it together. The tile that the end of the
keys cuts is the first one, so that no other needs a mask.

A width is held in one or two pieces that are powers of two, 160 = 128 + 32, as everywhere
(:func:`.packing.split_width`); a piece has boxes and rings of its own. Boxes reach past a tensor's end, where the copy
engine writes zeros.

Importing this needs a Triton with Gluon for Hopper; :mod:`.hopper` does so when it is asked.
"""

# Calls of a kernel know no unpacking, and a tuple that grows there has a new type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from .hopper_fetch import fetch, place
from .hopper_pieces import (
    finished,
    issue_products,
    issue_scores,
    rescaled_rows,
    side_by_side,
    sums_of_threads,
    write,
)

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
FETCHERS = gl.constexpr(1)  # warps that fetch
FETCHING = gl.constexpr(24)  # registers of a thread of theirs


@gluon.jit
def _multiply(
    part: gl.constexpr,
    rings,
    barriers,
    table_ptr,
    outputs,
    scale,
    extents,
    HEAD_0: gl.constexpr,
    HEAD_1: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    VALUE_0: gl.constexpr,
    VALUE_1: gl.constexpr,
    VALUES_0: gl.constexpr,
    VALUES_1: gl.constexpr,
    BRANCHES: gl.constexpr,
    BUNDLE: gl.constexpr,
    OUT_VECTOR: gl.constexpr,
    KNOWN: gl.constexpr,
    EVEN_KEYS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    TURNS: gl.constexpr,
):
    """A warpgroup that multiplies: query rows ``part`` · ROWS .. of each of the program's tiles."""
    q_0, q_1, k_0, k_1, v_0, v_1 = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = barriers
    out_start, logsumexp_start, out_stride_b, out_stride_h, out_stride_n, out_stride_e = outputs
    programs, heads, queries, keys = extents
    # Visibly multiples of what is written at once, which the compiler is not told of.
    out_stride_b = out_stride_b // OUT_VECTOR * OUT_VECTOR
    out_stride_h = out_stride_h // OUT_VECTOR * OUT_VECTOR
    out_stride_n = out_stride_n // OUT_VECTOR * OUT_VECTOR
    BUNDLES: gl.constexpr = BRANCHES // BUNDLE
    SPLIT: gl.constexpr = VALUE_1 > 0
    WIDE_0: gl.constexpr = BUNDLE * VALUE_0
    WIDE_1: gl.constexpr = BUNDLE * (VALUE_1 if VALUE_1 > 0 else VALUE_0)
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE_0, 16])
    O_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE_1, 16])
    # Of a row's sum, the parts of the four threads that hold the row; as S is laid out.
    SUMS: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]] if ROWS == 64 else [[8, 0], [64, 0]],
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [ROWS, 4],
    )
    PRODUCTS: gl.constexpr = BUNDLES * (2 if SPLIT else 1)
    TYPE: gl.constexpr = v_0.dtype
    query_tiles = gl.cdiv(queries, GROUPS * ROWS)
    tiles = gl.cdiv(keys, BLOCK_N)

    TILES: gl.constexpr = STAGES * BUNDLES
    values = (side_by_side(v_0, TYPE, TILES, BLOCK_N, WIDE_0, VALUES_0),)
    if SPLIT:
        values = values + (side_by_side(v_1, TYPE, TILES, BLOCK_N, WIDE_1, VALUES_1),)

    q_phase = 0
    k_slot = 0
    k_phase = 0
    v_slot = 0
    v_phase = 0
    # The first warpgroup begins: its barrier has completed nothing, which answers phase 1.
    turn_phase = 1 if part == 0 else 0
    for index in range(gl.program_id(0), programs, gl.num_programs(0)):
        tile, head, group_ptr = place(index, query_tiles, heads, table_ptr, BRANCHES)
        first_row = (tile * GROUPS + part) * ROWS
        rows = gl.arange(0, ROWS, gl.SliceLayout(1, S))
        accumulators = ()
        for _ in gl.static_range(BUNDLES):
            accumulators = accumulators + (gl.zeros([ROWS, WIDE_0], gl.float32, O_0),)
        if SPLIT:
            for _ in gl.static_range(BUNDLES):
                accumulators = accumulators + (gl.zeros([ROWS, WIDE_1], gl.float32, O_1),)

        mbarrier.wait(q_full, q_phase)
        q_phase ^= 1
        mbarrier.wait(k_full.index(k_slot), k_phase)
        in_flight = issue_scores(q_0, q_1, k_0, k_1, part, k_slot, HEAD_0, HEAD_1, ROWS, BLOCK_N, S)
        scores = warpgroup_mma_wait(0, deps=[in_flight])
        mbarrier.arrive(k_empty.index(k_slot))
        if not EVEN_KEYS:
            columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, S))
            scores = gl.where((columns < keys - (tiles - 1) * BLOCK_N)[None, :], scores, float("-inf"))
        if KNOWN:
            known_ptr = logsumexp_start + ((gl.load(group_ptr).to(gl.int64) * heads + head) * queries + first_row)
            known = gl.load(known_ptr + rows, mask=rows < queries - first_row, other=0.0)
            maximum = gl.where(known == float("-inf"), 0.0, known) * LOG2E
        else:
            maximum = gl.max(scores, 1) * scale
        exponentials = gl.exp2(scores * scale - maximum[:, None])
        normaliser = sums_of_threads(exponentials, ROWS, BLOCK_N, SUMS)
        probabilities = exponentials.to(TYPE)

        k_slot += 1
        if k_slot == STAGES:
            k_slot = 0
            k_phase ^= 1
        mbarrier.wait(k_full.index(k_slot), k_phase, pred=tiles > 1)
        for step in range(1, tiles):
            if TURNS:
                mbarrier.wait(turn.index(part), turn_phase)
                turn_phase ^= 1
            in_flight = issue_scores(q_0, q_1, k_0, k_1, part, k_slot, HEAD_0, HEAD_1, ROWS, BLOCK_N, S)
            mbarrier.wait(v_full.index(v_slot), v_phase)
            products = issue_products(probabilities, accumulators, values, v_slot, SPLIT, BUNDLES, O_0, O_1)
            if TURNS:
                mbarrier.arrive(turn.index((part + 1) % GROUPS))
            scores = warpgroup_mma_wait(PRODUCTS, deps=[in_flight])
            mbarrier.arrive(k_empty.index(k_slot))
            if not KNOWN:
                new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
                rescale = gl.exp2(maximum - new_maximum)
                maximum = new_maximum
            exponentials = gl.exp2(scores * scale - maximum[:, None])
            if not KNOWN:
                factor = gl.convert_layout(rescale, gl.SliceLayout(1, SUMS))[:, None]
                normaliser = normaliser * factor + sums_of_threads(exponentials, ROWS, BLOCK_N, SUMS)
            k_slot += 1
            if k_slot == STAGES:
                k_slot = 0
                k_phase ^= 1
            # Waiting for the next keys here also keeps the compiler from waiting for the products any earlier.
            mbarrier.wait(k_full.index(k_slot), k_phase, pred=step + 1 < tiles)
            accumulators = finished(products, PRODUCTS)
            mbarrier.arrive(v_empty.index(v_slot))
            probabilities = exponentials.to(TYPE)
            if not KNOWN:
                accumulators = rescaled_rows(accumulators, rescale, SPLIT, BUNDLES, O_0, O_1)
            v_slot += 1
            if v_slot == STAGES:
                v_slot = 0
                v_phase ^= 1
        mbarrier.arrive(q_empty)  # the next tile's may come
        mbarrier.wait(v_full.index(v_slot), v_phase)
        products = issue_products(probabilities, accumulators, values, v_slot, SPLIT, BUNDLES, O_0, O_1)
        accumulators = finished(products, PRODUCTS)
        mbarrier.arrive(v_empty.index(v_slot))
        v_slot += 1
        if v_slot == STAGES:
            v_slot = 0
            v_phase ^= 1

        if not KNOWN:
            # Worked out here, an address is held in no register while the loop runs.
            logsumexp_ptr = logsumexp_start + ((gl.load(group_ptr).to(gl.int64) * heads + head) * queries + first_row)
            total = gl.convert_layout(gl.sum(normaliser, 1), gl.SliceLayout(1, S))
            logsumexp = (maximum + gl.log2(total)) * LN2
            gl.store(logsumexp_ptr + rows, logsumexp, mask=rows < queries - first_row)
            accumulators = rescaled_rows(accumulators, 1.0 / total, SPLIT, BUNDLES, O_0, O_1)
        out_ptr = out_start + head.to(gl.int64) * out_stride_h
        where = (group_ptr + 1, first_row, queries, out_stride_b, out_stride_n, out_stride_e)
        # Constants stay constants in the call itself only.
        # fmt: off
        for bundle in gl.static_range(BUNDLES):
            write(accumulators[bundle], out_ptr, where, bundle * BUNDLE, ROWS, 0, VALUE_0, BUNDLE, VALUE_DIM,
                  OUT_VECTOR, O_0)
            if SPLIT:
                write(accumulators[BUNDLES + bundle], out_ptr, where, bundle * BUNDLE, ROWS, VALUE_0, VALUE_1, BUNDLE,
                      VALUE_DIM, OUT_VECTOR, O_1)
        # fmt: on


@gluon.jit
def hopper_kernel(
    query_0,  # descriptor of [G, H, N, D], boxes [1, 1, ROWS, HEAD_0]
    query_1,  # the same, boxes [1, 1, ROWS, HEAD_1]; None without a second piece, as key_1 and value_1
    key_0,  # descriptor of [G, H, M, D], boxes [1, 1, BLOCK_N, HEAD_0]
    key_1,
    value_0,  # descriptor of [B, H, M, E], boxes [1, 1, BLOCK_N, VALUE_0]
    value_1,
    out_ptr,  # [B, H, N, E]
    logsumexp_ptr,  # [G, H, N], contiguous
    table_ptr,  # [programs' groups, 1 + BRANCHES]: the map, then its batch rows
    scale,  # of the scores, times log2(e); positive
    programs,  # tiles in all
    heads,
    queries,
    keys,
    out_strides,
    HEAD_0: gl.constexpr,
    HEAD_1: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    VALUE_0: gl.constexpr,
    VALUE_1: gl.constexpr,
    BRANCHES: gl.constexpr,
    BUNDLE: gl.constexpr,
    OUT_VECTOR: gl.constexpr,
    KNOWN: gl.constexpr,
    EVEN_KEYS: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    TURNS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    TYPE: gl.constexpr = query_0.dtype
    q_0 = gl.allocate_shared_memory(TYPE, [GROUPS, 1, 1, ROWS, HEAD_0], query_0.layout)
    k_0 = gl.allocate_shared_memory(TYPE, [STAGES, 1, 1, BLOCK_N, HEAD_0], key_0.layout)
    v_0 = gl.allocate_shared_memory(TYPE, [STAGES * BRANCHES, 1, 1, BLOCK_N, VALUE_0], value_0.layout)
    q_1 = q_0
    k_1 = k_0
    v_1 = v_0
    if HEAD_1 > 0:
        q_1 = gl.allocate_shared_memory(TYPE, [GROUPS, 1, 1, ROWS, HEAD_1], query_1.layout)
        k_1 = gl.allocate_shared_memory(TYPE, [STAGES, 1, 1, BLOCK_N, HEAD_1], key_1.layout)
    if VALUE_1 > 0:
        v_1 = gl.allocate_shared_memory(TYPE, [STAGES * BRANCHES, 1, 1, BLOCK_N, VALUE_1], value_1.layout)

    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=GROUPS)
    for part in gl.static_range(GROUPS):
        mbarrier.init(turn.index(part), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        # A warpgroup arrives once.
        mbarrier.init(k_empty.index(slot), count=GROUPS)
        mbarrier.init(v_empty.index(slot), count=GROUPS)
    # The copy engine sees the barriers as they are now.
    fence_async_shared()

    VALUES_0: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * VALUE_0), 16, 2)
    VALUES_1: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * VALUE_1) if VALUE_1 > 0 else 32, 16, 2)
    rings = (q_0, q_1, k_0, k_1, v_0, v_1)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)
    outputs = (out_ptr, logsumexp_ptr, out_strides[0], out_strides[1], out_strides[2], out_strides[3])
    extents = (programs, heads, queries, keys)
    # Constants stay constants in the call itself only.
    # fmt: off
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply, (0, rings, barriers, table_ptr, outputs, scale, extents, HEAD_0, HEAD_1, VALUE_DIM, VALUE_0,
                             VALUE_1, VALUES_0, VALUES_1, BRANCHES, BUNDLE, OUT_VECTOR, KNOWN, EVEN_KEYS, BLOCK_N,
                             STAGES, GROUPS, ROWS, TURNS)),
                (fetch, (query_0, query_1, key_0, key_1, value_0, value_1, rings, barriers, table_ptr, extents, HEAD_0,
                         HEAD_1, VALUE_0, VALUE_1, BRANCHES, BLOCK_N, STAGES, GROUPS, ROWS)),
            ],
            [FETCHERS],
            [FETCHING],
        )
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (0, rings, barriers, table_ptr, outputs, scale, extents, HEAD_0, HEAD_1, VALUE_DIM, VALUE_0,
                             VALUE_1, VALUES_0, VALUES_1, BRANCHES, BUNDLE, OUT_VECTOR, KNOWN, EVEN_KEYS, BLOCK_N,
                             STAGES, GROUPS, ROWS, TURNS)),
                (_multiply, (1, rings, barriers, table_ptr, outputs, scale, extents, HEAD_0, HEAD_1, VALUE_DIM, VALUE_0,
                             VALUE_1, VALUES_0, VALUES_1, BRANCHES, BUNDLE, OUT_VECTOR, KNOWN, EVEN_KEYS, BLOCK_N,
                             STAGES, GROUPS, ROWS, TURNS)),
                (fetch, (query_0, query_1, key_0, key_1, value_0, value_1, rings, barriers, table_ptr, extents, HEAD_0,
                         HEAD_1, VALUE_0, VALUE_1, BRANCHES, BLOCK_N, STAGES, GROUPS, ROWS)),
            ],
            [4, FETCHERS],
            [REGISTERS, FETCHING],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, rings, barriers, table_ptr, outputs, scale, extents, HEAD_0, HEAD_1, VALUE_DIM, VALUE_0,
                             VALUE_1, VALUES_0, VALUES_1, BRANCHES, BUNDLE, OUT_VECTOR, KNOWN, EVEN_KEYS, BLOCK_N,
                             STAGES, GROUPS, ROWS, TURNS)),
                (_multiply, (1, rings, barriers, table_ptr, outputs, scale, extents, HEAD_0, HEAD_1, VALUE_DIM, VALUE_0,
                             VALUE_1, VALUES_0, VALUES_1, BRANCHES, BUNDLE, OUT_VECTOR, KNOWN, EVEN_KEYS, BLOCK_N,
                             STAGES, GROUPS, ROWS, TURNS)),
                (_multiply, (2, rings, barriers, table_ptr, outputs, scale, extents, HEAD_0, HEAD_1, VALUE_DIM, VALUE_0,
                             VALUE_1, VALUES_0, VALUES_1, BRANCHES, BUNDLE, OUT_VECTOR, KNOWN, EVEN_KEYS, BLOCK_N,
                             STAGES, GROUPS, ROWS, TURNS)),
                (fetch, (query_0, query_1, key_0, key_1, value_0, value_1, rings, barriers, table_ptr, extents, HEAD_0,
                         HEAD_1, VALUE_0, VALUE_1, BRANCHES, BLOCK_N, STAGES, GROUPS, ROWS)),
            ],
            [4, 4, FETCHERS],
            [REGISTERS, REGISTERS, FETCHING],
        )
    # fmt: on
