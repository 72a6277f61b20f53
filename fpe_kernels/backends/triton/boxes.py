"""Forward through tensor descriptors, for the widths that are boxes of memory: a candidate of the tuner on Hopper.

    O_b = softmax(scale · Q_g K_gᵀ) V_b     for every batch row b with map_index[b] = g

What :mod:`.apply` computes without bias, weights or a known log-sum-exp. Queries, keys and values arrive as boxes that
the bulk copy engine fetches, one instruction a box, with zeros where a box reaches past a tensor: no thread computes an
address or a mask. The values of the branches come in one box of consecutive batch rows. A box has powers of two for
edges, so the head dim, the value dim and the number of branches must be such. SPECIALISED asks the compiler for further
warps, which fetch while the others compute; some releases of Triton refuse that for some tiles.

No rule of :mod:`.configs` chooses this kernel; the tuner times it, and its table may.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import Config
from .launch import Launch, product_precision, strides
from .packing import MIN_PIECE, Chunk, device_table, needs_wide_index, vector_width
from .primitives import LN2, LOG2E, aligned, dot, online_softmax_update, packed_columns, tile_index


@triton.jit
def boxes_kernel(
    query,  # descriptor of [G, H, N, D], boxes [1, 1, BLOCK_M, D]
    key,  # descriptor of [G, H, M, D], boxes [1, 1, BLOCK_N, D]
    value,  # descriptor of [B, H, M, E], boxes [BRANCHES, 1, BLOCK_N, E]
    out_ptr,  # [B, H, N, E]
    logsumexp_ptr,  # [G, H, N], contiguous
    table_ptr,  # [programs' groups, 1 + BRANCHES]: the map, then its batch rows, one after the other
    scale,  # of the scores, times log2(e); positive
    heads,
    queries,
    keys,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    out_stride_e,
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
    COLUMNS: tl.constexpr = BRANCHES * VALUE_DIM
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % heads
    group_ptr = table_ptr + (tl.program_id(0) // tiles // heads) * (1 + BRANCHES)
    group = tl.load(group_ptr)
    first_row = tl.load(group_ptr + 1)

    q = query.load([group, head, tile * BLOCK_M, 0]).reshape([BLOCK_M, HEAD_DIM])
    columns = tl.arange(0, BLOCK_N)
    maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    normaliser = tl.zeros([BLOCK_M], dtype=tl.float32)
    accumulator = tl.zeros([BLOCK_M, COLUMNS], dtype=tl.float32)
    for start_n in tl.range(0, keys, BLOCK_N, warp_specialize=SPECIALISED):
        k = key.load([group, head, start_n, 0]).reshape([BLOCK_N, HEAD_DIM])
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION)
        if not EVEN_KEYS:
            scores = tl.where((columns < keys - start_n)[None, :], scores, float("-inf"))
        probabilities, rescale, maximum, normaliser = online_softmax_update(scores, scale, maximum, normaliser, False)
        v = value.load([first_row, head, start_n, 0]).reshape([BRANCHES, BLOCK_N, VALUE_DIM])
        v = tl.permute(v, [1, 0, 2]).reshape([BLOCK_N, COLUMNS])
        accumulator = dot(probabilities.to(v.dtype), v, accumulator * rescale[:, None], PRECISION)

    start_m = tile.to(tl.int64) * BLOCK_M
    rows = tile_index(BLOCK_M, WIDE)
    row_valid = rows < queries - start_m
    head64 = head.to(tl.int64)
    logsumexp_ptr += (group.to(tl.int64) * heads + head64) * queries + start_m
    tl.store(logsumexp_ptr + rows, (maximum + tl.log2(normaliser)) * LN2, mask=row_valid)
    out_stride_n = aligned(out_stride_n, OUT_VECTOR)
    out_ptr += head64 * aligned(out_stride_h, OUT_VECTOR) + start_m * out_stride_n
    o_columns, _ = packed_columns(
        group_ptr + 1, out_stride_b, out_stride_e, 0, COLUMNS, VALUE_DIM, COLUMNS, OUT_VECTOR, WIDE
    )
    tl.store(
        out_ptr + rows[:, None] * out_stride_n + o_columns[None, :],
        (accumulator / normaliser[:, None]).to(out_ptr.dtype.element_ty),
        mask=row_valid[:, None],
    )


def serves(query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, scale: float) -> bool:
    """Whether boxes can hold a launch of ``chunk``; ``value`` is narrowed to its columns."""
    consecutive = all(rows == list(range(rows[0], rows[0] + len(rows))) for _, *rows in chunk.table)
    edges = query.shape[3], value.shape[3], MIN_PIECE * chunk.branches
    powers = all(edge >= MIN_PIECE and edge & (edge - 1) == 0 for edge in edges)
    aligned_rows = all(map(_boxable, (query, key, value)))
    return consecutive and powers and aligned_rows and query.element_size() == 2 and scale > 0.0


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
            "value": (chunk.branches, 1, config.block_n, value_dim),
        },
        numbers={
            "scale": scale * LOG2E.value,
            "heads": heads,
            "queries": queries,
            "keys": keys,
            **strides("out", out, "bhne"),
        },
        constants={
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BRANCHES": chunk.branches,
            "OUT_VECTOR": vector_width(out),
            "EVEN_KEYS": keys % config.block_n == 0,
            "SPECIALISED": config.specialised,
            "WIDE": needs_wide_index((out, config.block_m)),
            "PRECISION": product_precision(query.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
    )
