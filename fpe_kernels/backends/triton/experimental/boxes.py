"""Forward through tensor descriptors, for the widths that are boxes of memory: by name, where Gluon is missing.

    O_b = softmax(scale · Q_g K_gᵀ) V_b     for every batch row b with map_index[b] = g

What :mod:`..apply` computes without bias, weights or a known log-sum-exp. Queries, keys and the values of each branch
arrive as boxes that the bulk copy engine fetches, one instruction a box, with zeros where a box reaches past a tensor:
no thread computes an address or a mask. A box has powers of two for edges, so head dim and value dim must be such. The
scores of the next tile are issued before the softmax of this one, and every branch has a product and an accumulator
of its own, so that values are read where they lie. SPECIALISED asks the compiler for further warps, which fetch while
the others compute; some releases of Triton refuse that for some tiles.

No rule of :mod:`..configs` chooses this kernel; the tuner times it, and its table may. On an H200 it was no faster
than the pointer kernel (0.33 to 0.35 ms beside 0.34 at head dim 64, 0.91 beside 0.88 at 128); :mod:`..hopper` was.
Triton 3.6 keeps its products in flight; 3.9 waits for each one at most widths, which the tuner refuses.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..configs import Config
from ..launch import Launch, folds, product_precision
from ..packing import MIN_PIECE, Chunk, device_table, needs_wide_index, vector_width
from ..primitives import LN2, LOG2E, aligned, dot, online_softmax_update, tile_index

MOST_BRANCHES = 4


@triton.jit
def boxes_kernel(
    query,  # descriptor of [G, H, N, D], boxes [1, 1, BLOCK_M, D]
    key,  # descriptor of [G, H, M, D], boxes [1, 1, BLOCK_N, D]
    value,  # descriptor of [B, H, M, E], boxes [1, 1, BLOCK_N, E]
    out_ptr,  # [B, H, N, E]
    logsumexp_ptr,  # [G, H, N], contiguous
    table_ptr,  # [programs' groups, 1 + BRANCHES]: the map, then its batch rows
    scale,  # of the scores, times log2(e); positive
    heads,
    queries,
    keys,
    out_strides,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BRANCHES: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    SPECIALISED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % heads
    group_ptr = table_ptr + (tl.program_id(0) // tiles // heads) * (1 + BRANCHES)
    group = tl.load(group_ptr)

    q = query.load([group, head, tile * BLOCK_M, 0]).reshape([BLOCK_M, HEAD_DIM])
    columns = tl.arange(0, BLOCK_N)
    maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    normaliser = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Read again for a launch of fewer branches, which does not use them; the compiler drops them.
    row_0 = tl.load(group_ptr + 1)
    row_1 = tl.load(group_ptr + min(2, BRANCHES))
    row_2 = tl.load(group_ptr + min(3, BRANCHES))
    row_3 = tl.load(group_ptr + min(4, BRANCHES))
    sum_0 = tl.zeros([BLOCK_M, VALUE_DIM], dtype=tl.float32)
    sum_1 = sum_0
    sum_2 = sum_0
    sum_3 = sum_0
    k = key.load([group, head, 0, 0]).reshape([BLOCK_N, HEAD_DIM])
    scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION)
    for start_n in tl.range(0, keys, BLOCK_N, warp_specialize=SPECIALISED):
        # Past the end of the keys these are zeros, of which nothing is made.
        k = key.load([group, head, start_n + BLOCK_N, 0]).reshape([BLOCK_N, HEAD_DIM])
        next_scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION)
        if not EVEN_KEYS:
            scores = tl.where((columns < keys - start_n)[None, :], scores, float("-inf"))
        probabilities, rescale, maximum, normaliser = online_softmax_update(scores, scale, maximum, normaliser, False)
        p = probabilities.to(q.dtype)
        factor = rescale[:, None]
        sum_0 = dot(p, _values(value, row_0, head, start_n, BLOCK_N, VALUE_DIM), sum_0 * factor, PRECISION)
        if BRANCHES > 1:
            sum_1 = dot(p, _values(value, row_1, head, start_n, BLOCK_N, VALUE_DIM), sum_1 * factor, PRECISION)
        if BRANCHES > 2:
            sum_2 = dot(p, _values(value, row_2, head, start_n, BLOCK_N, VALUE_DIM), sum_2 * factor, PRECISION)
        if BRANCHES > 3:
            sum_3 = dot(p, _values(value, row_3, head, start_n, BLOCK_N, VALUE_DIM), sum_3 * factor, PRECISION)
        scores = next_scores

    start_m = tile.to(tl.int64) * BLOCK_M
    rows = tile_index(BLOCK_M, WIDE)
    row_valid = rows < queries - start_m
    head64 = head.to(tl.int64)
    logsumexp_ptr += (group.to(tl.int64) * heads + head64) * queries + start_m
    tl.store(logsumexp_ptr + rows, (maximum + tl.log2(normaliser)) * LN2, mask=row_valid)
    out_stride_b, out_stride_n = aligned(out_strides[0], OUT_VECTOR), aligned(out_strides[2], OUT_VECTOR)
    entries = tile_index(VALUE_DIM, WIDE) * out_strides[3]
    out_ptr += head64 * aligned(out_strides[1], OUT_VECTOR) + start_m * out_stride_n
    out_ptrs = out_ptr + rows[:, None] * out_stride_n + entries[None, :]
    _write(out_ptrs, row_0, out_stride_b, sum_0, normaliser, row_valid)
    if BRANCHES > 1:
        _write(out_ptrs, row_1, out_stride_b, sum_1, normaliser, row_valid)
    if BRANCHES > 2:
        _write(out_ptrs, row_2, out_stride_b, sum_2, normaliser, row_valid)
    if BRANCHES > 3:
        _write(out_ptrs, row_3, out_stride_b, sum_3, normaliser, row_valid)


@triton.jit
def _values(value, row, head, start_n, BLOCK_N: tl.constexpr, VALUE_DIM: tl.constexpr):
    return value.load([row, head, start_n, 0]).reshape([BLOCK_N, VALUE_DIM])


@triton.jit
def _write(out_ptrs, row, stride, accumulator, normaliser, row_valid):
    quotient = (accumulator / normaliser[:, None]).to(out_ptrs.dtype.element_ty)
    tl.store(out_ptrs + row.to(tl.int64) * stride, quotient, mask=row_valid[:, None])


def serves(query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, scale: float) -> bool:
    """Whether boxes can hold a launch of ``chunk``; ``value`` is narrowed to its columns."""
    edges = query.shape[3], value.shape[3]
    powers = all(edge >= MIN_PIECE and edge & (edge - 1) == 0 for edge in edges)
    aligned_rows = all(map(_boxable, (query, key, value)))
    return chunk.branches <= MOST_BRANCHES and powers and aligned_rows and query.element_size() == 2 and folds(scale)


def _boxable(tensor: Tensor) -> bool:
    """What the copy engine asks of memory: something there, neighbours in the last axis, rows aligned to 16 bytes."""
    steps = [stride * tensor.element_size() for stride in tensor.stride()[:3]]
    in_step = all(step > 0 and step % 16 == 0 for step in steps)
    return tensor.numel() > 0 and tensor.stride(3) == 1 and in_step and tensor.data_ptr() % 16 == 0


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk: Chunk,
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
    config: Config,
) -> Launch:
    """The launch of one chunk that :func:`serves`; ``value`` and ``out`` are narrowed to its columns."""
    _, heads, queries, head_dim = query.shape
    keys, value_dim = key.shape[2], value.shape[3]
    return Launch(
        boxes_kernel,
        programs=-(-queries // config.block_m) * heads * len(chunk.table),
        config=config,
        tensors={
            "query": query,
            "key": key,
            "value": value,
            "out_ptr": out,
            "logsumexp_ptr": logsumexp,
            "table_ptr": device_table(chunk.table, query.device),
        },
        boxes={
            "query": (1, 1, config.block_m, head_dim),
            "key": (1, 1, config.block_n, head_dim),
            "value": (1, 1, config.block_n, value_dim),
        },
        numbers={
            "scale": scale * LOG2E.value,
            "heads": heads,
            "queries": queries,
            "keys": keys,
            "out_strides": out.stride(),
        },
        constants={
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BRANCHES": chunk.branches,
            "OUT_VECTOR": vector_width(out),
            "EVEN_KEYS": keys % config.block_n == 0,
            "SPECIALISED": config.specialised,
            "WIDE": needs_wide_index(config.block_m, out),
            "PRECISION": product_precision(query.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
    )
