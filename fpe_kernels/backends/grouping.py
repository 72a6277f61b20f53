"""Which batch rows share which map, as every backend needs to know it."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=256)
def rows_by_map(map_index: tuple[int, ...], maps: int) -> tuple[tuple[int, ...], ...]:
    """For each of the ``maps`` maps, the batch rows that name it, in order.

    >>> rows_by_map((0, 2, 2), 3)
    ((0,), (), (1, 2))
    """
    rows: list[list[int]] = [[] for _ in range(maps)]
    for row, index in enumerate(map_index):
        rows[index].append(row)
    return tuple(tuple(entry) for entry in rows)
