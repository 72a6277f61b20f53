"""The warp of :mod:`.hopper_kernel` that fetches, and the order in which a program takes its tiles."""

# Calls of a kernel know no unpacking, and a tuple that grows there has a new type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.8 renamed it.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def place(index, query_tiles, heads, table_ptr, BRANCHES: gl.constexpr):
    """The tile of queries, the head and the entry of the table of tile number ``index`` of all.

    Neighbours share keys and values, which the cache holds for those that run side by side.
    """
    tile = index % query_tiles
    head = (index // query_tiles) % heads
    return tile, head, table_ptr + (index // query_tiles // heads) * (1 + BRANCHES)


@gluon.jit
def fetch(
    query_0,
    query_1,
    key_0,
    key_1,
    value_0,
    value_1,
    rings,
    barriers,
    table_ptr,
    extents,
    HEAD_0: gl.constexpr,
    HEAD_1: gl.constexpr,
    VALUE_0: gl.constexpr,
    VALUE_1: gl.constexpr,
    BRANCHES: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """The warp that fetches: of each tile the queries, then keys and values, the last of them first."""
    q_0, q_1, k_0, k_1, v_0, v_1 = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    programs, heads, queries, keys = extents
    query_tiles = gl.cdiv(queries, GROUPS * ROWS)
    tiles = gl.cdiv(keys, BLOCK_N)
    slot = 0
    # A barrier that has completed nothing answers a wait for its phase 1 at once: the slots are empty.
    phase = 1
    q_phase = 1
    for index in range(gl.program_id(0), programs, gl.num_programs(0)):
        tile, head, group_ptr = place(index, query_tiles, heads, table_ptr, BRANCHES)
        group = gl.load(group_ptr)
        mbarrier.wait(q_empty, q_phase)
        q_phase ^= 1
        # Two bytes an element; what lies past a tensor's end counts too.
        mbarrier.expect(q_full, 2 * GROUPS * ROWS * (HEAD_0 + HEAD_1))
        for part in gl.static_range(GROUPS):
            row = (tile * GROUPS + part) * ROWS
            _load(query_0, [group, head, row, 0], q_full, q_0.index(part))
            if HEAD_1 > 0:
                _load(query_1, [group, head, row, HEAD_0], q_full, q_1.index(part))
        batch_rows = ()
        if BRANCHES <= 2:
            for branch in gl.static_range(BRANCHES):
                batch_rows = batch_rows + (gl.load(group_ptr + 1 + branch),)
        start = (tiles - 1) * BLOCK_N
        for step in range(tiles):
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), 2 * BLOCK_N * (HEAD_0 + HEAD_1))
            _load(key_0, [group, head, start, 0], k_full.index(slot), k_0.index(slot))
            if HEAD_1 > 0:
                _load(key_1, [group, head, start, HEAD_0], k_full.index(slot), k_1.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), 2 * BLOCK_N * BRANCHES * (VALUE_0 + VALUE_1))
            for branch in gl.static_range(BRANCHES):
                # More than two take more registers than this warp has: they are read anew from the cache.
                row = batch_rows[branch] if BRANCHES <= 2 else gl.load(group_ptr + 1 + branch)
                _load(value_0, [row, head, start, 0], v_full.index(slot), v_0.index(slot * BRANCHES + branch))
                if VALUE_1 > 0:
                    _load(value_1, [row, head, start, VALUE_0], v_full.index(slot), v_1.index(slot * BRANCHES + branch))
            start = step * BLOCK_N
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
