"""Where a user's code needs the numbers of a map: whose line it is, what it costs, and the numbers in blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from fpe_kernels import LinearMap, known_columns

from ...callers import asking_line

__all__ = [
    "MapNumbersWarning",
    "as_known",
    "blocks_of_rows",
    "converted",
    "entries",
    "summable",
    "warn_of_numbers",
]

#: Bytes of a block of rows where an operation goes block by block.
BLOCK_BYTES = 1 << 26
_told: set[tuple[str, int]] = set()


class MapNumbersWarning(RuntimeWarning):
    """A line of a user's code needs the numbers of an attention map, which are then written out for that layer."""


def summable(attn: Any) -> Any:
    """A map, or a tensor, as maps of many steps are added to it: in half precision each addition would round it, by
    more as it grows, so that it is in float32 at the least.
    """
    return attn.to(torch.promote_types(attn.dtype, torch.float32))


def warn_of_numbers(operation: str, shape: tuple[int, ...], dtype: torch.dtype, nbytes: int | None = None) -> None:
    """Warn, once for each line, of a line of a user's code that needs the numbers of a map.

    Args:
        operation: what the line does with the map.
        shape: of the numbers.
        dtype: of the numbers.
        nbytes: that are held at once; default: all of them.
    """
    file, line = asking_line()
    if (file, line) in _told:
        return
    _told.add((file, line))
    whole = dtype.itemsize
    for size in shape:
        whole *= size
    how = "written out for this layer alone" if nbytes is None else f"written out {nbytes:,} bytes at a time"
    warnings.warn_explicit(
        f"{file}:{line} needs the numbers of an attention map ({operation}): {list(shape)}, {str(dtype)[6:]}, "
        f"{whole:,} bytes, {how}. Products, slices, sums, means, scaling, mixing and assigned columns do without. What "
        "is changed in such numbers in place is not changed in the map. This line is not told of again.",
        MapNumbersWarning,
        file,
        line,
    )


def forget_lines() -> None:
    """Tell of every line anew: controllers have been installed."""
    _told.clear()


def entries(rows: LinearMap) -> torch.Tensor:
    """The numbers of a map [R, 1, N, M] as [R, N, M]."""
    blocks = [block for _, block in blocks_of_rows(rows)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-2)


def blocks_of_rows(rows: LinearMap) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, numbers [R, n, M]) of the query rows from ``start`` on, of :data:`BLOCK_BYTES` or a row at least."""
    count, _, queries, keys = rows.shape
    step = max(1, BLOCK_BYTES // (count * keys * rows.dtype.itemsize))
    for start in range(0, queries, step):
        yield start, rows.rows(range(start, min(start + step, queries)))[:, 0]


def as_known(numbers: torch.Tensor) -> LinearMap:
    """Numbers [R, N, M] as a map [R, 1, N, M]."""
    return known_columns(numbers[:, None], range(numbers.shape[-1]), numbers.shape[-1])


def converted(rows: LinearMap, dtype: torch.dtype) -> LinearMap:
    """A map [R, 1, N, M] in another dtype; by its numbers where that cannot be said of what it is made from."""
    if rows.dtype == dtype:
        return rows
    given: Any = rows
    try:
        moved: LinearMap = given.to(dtype=dtype)
    except (AttributeError, TypeError):  # joined or cut maps
        moved = as_known(entries(rows).to(dtype))
    return moved
