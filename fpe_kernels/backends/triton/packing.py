"""How work is cut before a launch: widths into pieces, branches into chunks of columns, batch rows into tables."""

from __future__ import annotations

import math
import operator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from ..grouping import rows_by_map

MIN_PIECE = 16  # the shortest tile edge that the matrix instructions take in every dtype


def _power_of_two(width: int) -> int:
    return max(MIN_PIECE, 1 << (width - 1).bit_length())


@cache
def split_width(width: int) -> tuple[int, int]:
    """Cut ``width`` into one or two power-of-two pieces with the least padding; one piece where that pads no more.

    >>> [split_width(width) for width in (8, 40, 72, 80, 96, 120, 128, 160, 320)]
    [(16, 0), (32, 16), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0), (128, 32), (256, 64)]
    """
    if width == 0:
        return 0, 0
    whole = _power_of_two(width)
    half = whole // 2
    if half >= MIN_PIECE and half < width:
        rest = _power_of_two(width - half)
        if half + rest < whole:
            return half, rest
    return whole, 0


@cache
def widths(columns: int) -> tuple[int, ...]:
    """What a kernel is told of a width: its columns, then the width of each piece that holds them.

    >>> [widths(columns) for columns in (0, 40, 64)]
    [(0,), (40, 32, 16), (64, 64)]
    """
    return columns, *filter(None, split_width(columns))


@dataclass(frozen=True)
class Chunk:
    """One launch: ``branches`` batch rows of each of some maps, and the columns ``start`` .. ``stop`` of each row.

    A map with fewer rows than that names its last one again; such a branch is read and not written.
    """

    table: tuple[tuple[int, ...], ...]  # for each program group: the map, then its batch rows
    start: int
    stop: int
    first: bool  # no earlier chunk has computed the log-sum-exp of these maps

    @property
    def branches(self) -> int:
        return len(self.table[0]) - 1

    @property
    def repeats(self) -> bool:
        """Whether some map names a row again to be as wide as the others."""
        return any(len(set(rows)) < len(rows) for _, *rows in self.table)


@lru_cache(maxsize=256)
def chunks(
    map_index: tuple[int, ...], maps: int, value_dim: int, max_columns: int, together: bool = False
) -> tuple[Chunk, ...]:
    """Cut the packed columns of every map into launches of at most ``max_columns``.

    Maps with equally many batch rows share a launch; ``together``, all maps do, as wide as the widest of them. A value
    wider than ``max_columns`` is cut by columns; otherwise branches are dealt out in chunks of equal size, so that no
    launch is left with a narrow remainder.
    """
    if value_dim > max_columns:
        spans = [(start, min(start + max_columns, value_dim)) for start in range(0, value_dim, max_columns)]
        capacity = 1
    else:
        spans, capacity = [(0, value_dim)], max(1, max_columns // max(1, value_dim))
    # By part, so that a map comes once in a launch: programs that add to one gradient must not run at the same time.
    launches: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for group, rows in enumerate(rows_by_map(map_index, maps)):
        if not rows:
            continue
        parts = -(-len(rows) // capacity)
        share, extra = divmod(len(rows), parts)
        start = 0
        for part in range(parts):
            stop = start + share + (part < extra)
            width = 0 if together else stop - start
            launches.setdefault((part, width), []).append((group, *rows[start:stop]))
            start = stop
    ordered = sorted(launches.items(), key=lambda item: item[0][0])
    return tuple(
        Chunk(_equally_long(table), *span, first=part == 0 and position == 0)
        for (part, _), table in ordered
        for position, span in enumerate(spans)
    )


def _equally_long(table: list[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Every entry as long as the longest, by naming its last batch row again."""
    longest = max(map(len, table))
    return tuple(entry + entry[-1:] * (longest - len(entry)) for entry in table)


# Without a bound: a captured CUDA graph reads its table at every replay without saying so, and a table is a few bytes.
@cache
def device_table(table: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """``table`` on ``device``; kept, so that a repeated call copies nothing and can be captured in a CUDA graph."""
    if device.type != "cuda":
        return torch.tensor(table, dtype=torch.int32, device=device)
    # The first call may be the warm-up of a graph, whose thread allocates from the graph's own pool; what is there is
    # overwritten between replays. A pool is a matter of threads, and this one is not of the pool's.
    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(_copied, table, device).result()


def device_lengths(key_lengths: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    """:func:`device_table` of the keys of each map, or None."""
    return None if key_lengths is None else device_table((key_lengths,), device)


def _copied(table: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    with torch.cuda.device(device):
        copy = torch.tensor(table, dtype=torch.int32, device=device)
        # Other streams read it from now on.
        torch.cuda.current_stream().synchronize()
        return copy


def vector_width(tensor: Tensor) -> int:
    """How many neighbours of the last axis of [B, H, L, E] move in one access of at most 16 bytes."""
    if tensor.stride(3) != 1:
        return 1
    limit = 16 // tensor.element_size()
    width = math.gcd(limit, tensor.shape[3], *tensor.stride()[:3])
    while width > 1 and tensor.data_ptr() % (width * tensor.element_size()):
        width //= 2
    return width


def bias_varies(bias: Tensor | None) -> str:
    """Over which of its last two axes an expanded bias differs: "rows", "columns" or "both"; "" where there is none."""
    if bias is None:
        return ""
    if bias.stride(2) == 0:
        return "columns"
    return "rows" if bias.stride(3) == 0 else "both"


def needs_wide_index(rows: int, *tensors: Tensor | None) -> bool:
    """Whether an offset inside a tile passes 2³¹: ``rows`` rows of [B, H, L(, E)], in whatever batch row."""
    return any(tensor is not None and _reach(tensor, rows) >= 2**31 for tensor in tensors)


def _reach(tensor: Tensor, rows: int) -> int:
    """Elements from the start of a head to the end of a tile of it, in the last batch row."""
    (batch, _, _, *entries), (of_batch, _, of_row, *of_entry) = tensor.shape, tensor.stride()
    within: int = sum(map(operator.mul, entries, of_entry))
    return (batch - 1) * of_batch + rows * of_row + within


def columns_of(tensor: Tensor, chunk: Chunk) -> Tensor:
    """The view of the columns that ``chunk`` covers."""
    if chunk.stop - chunk.start == tensor.shape[3]:
        return tensor
    return tensor[..., chunk.start : chunk.stop]
