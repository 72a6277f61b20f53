"""Slices of a lazy map, and what is assigned to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from numbers import Real
from typing import Any, Self

import torch

from fpe_kernels import LinearMap, known_columns, stack

from .numbers import converted, warn_of_numbers
from .view import MapView

__all__ = ["Indexing"]

_ALL = slice(None)


class Indexing(MapView):
    """``A[rows, heads, queries, keys]`` in any of a tensor's ways.

    Rows and heads, ranges of queries and ranges of keys give a map; single queries and keys, and lists of them, give
    their numbers. What mixes lists of several axes needs the whole map's numbers. As of a tensor, lists give copies,
    and all else views: what is changed in them, numbers too, is changed in the map.
    """

    def __getitem__(self, key: Any) -> Any:
        lead, grid, keys = self._split(key)
        if lead is None:
            return self.numbers("indexing by lists of several axes")[key]
        index = self._index[lead]
        part = self._view(index)
        if not index.numel():
            return torch.empty(torch.empty(self.shape, device="meta")[key].shape, device=self.device, dtype=self.dtype)
        if any(_is_list(item) for item in lead):
            part = part.clone()
        if not _whole(grid):
            return part._of_queries(grid, keys)
        if keys == _ALL:
            return part
        if isinstance(keys, slice):
            start, stop, step = keys.indices(self.shape[-1])
            if step == 1 and stop > start:
                return part._cut(lambda: part.operator.block(keys=(start, stop)), (keys,), part._grid)
            columns = part._columns(list(range(start, stop, step)))
            return part._lent(columns, (keys,)) if step != 1 else columns
        columns = part._columns(keys)
        return part._lent(columns, (keys,)) if isinstance(keys, int) else columns

    def __setitem__(self, key: Any, value: Any) -> None:
        lead, grid, keys = self._split(key)
        span = None if lead is None else _range(grid, self._grid) or _place(grid, self._grid)
        if lead is None or span is None:
            self._assign_numbers(key, value)
            return
        part = self._view(self._index[lead])
        if not part._index.numel():
            return
        if not _whole(grid):
            if keys == _ALL:
                part._assign_queries(span, value)
            else:
                rows = (..., *grid, _ALL)
                some = part[rows]
                if isinstance(some, torch.Tensor):
                    some = some.clone()
                    some[..., keys] = value
                    part[rows] = some
                else:
                    some[..., keys] = value
            return
        shape = tuple(part._index.shape)
        if keys == _ALL:
            if value is not part:
                part._write(part._as_rows(value, shape, "assignment"))
            return
        positions = _positions(keys, self.shape[-1])
        if isinstance(keys, int) and isinstance(value, torch.Tensor):
            value = value.unsqueeze(-1) if value.ndim else value
        others = torch.ones(self.shape[-1], dtype=self._storage.dtype)
        others[positions] = 0.0
        kept = part.operator.scale_columns(part._of_map(others))
        if not (isinstance(value, Real) and value == 0):
            kept = kept + part._scattered(value, positions)
        part._write(kept)

    def _split(self, key: Any) -> tuple[Any, tuple[Any, ...], Any]:
        """What a key says of the leading axes, of the queries and of the keys; None first where it mixes lists."""
        items = list(key) if isinstance(key, tuple) else [key]
        used = sum(_width(item) for item in items if item is not Ellipsis and item is not None)
        if used > self.ndim:
            raise IndexError(f"too many indices for a map of shape {tuple(self.shape)}: {key!r}")
        where = next((place for place, item in enumerate(items) if item is Ellipsis), len(items))
        items[where : where + 1] = [_ALL] * (self.ndim - used)
        leading: list[Any] = []
        axes = 0
        while items and (axes < self._index.ndim or items[0] is None):
            item = items.pop(0)
            axes += 0 if item is None else _width(item)
            leading.append(item.cpu() if isinstance(item, torch.Tensor) else item)
        rest = [_plain(item) for item in items]
        lists = sum(not isinstance(item, int | slice) for item in rest)
        listed_rows = any(isinstance(item, torch.Tensor | list) for item in leading)
        if axes != self._index.ndim or None in rest or lists > 1 or (lists and listed_rows):
            return None, (), _ALL
        ints = any(isinstance(item, int) for item in rest)
        if (lists and ints) or (listed_rows and ints):
            return None, (), _ALL
        return tuple(leading), tuple(rest[:-1]), rest[-1]

    def _of_queries(self, grid: tuple[Any, ...], keys: Any) -> Any:
        span = _range(grid, self._grid)
        if span is not None:
            start, stop, shape = span
            cut = self._cut(lambda: self.operator.queries(start, stop), (*grid, _ALL), shape)
            return cut if keys == _ALL else cut[(..., keys)]
        place = torch.arange(prod(self._grid)).reshape(self._grid)[grid]
        flat = place.flatten().tolist()
        rows = self.operator.rows(flat)[:, 0]  # [R, n, M]
        numbers = self._given(rows.reshape(*self._index.shape, *place.shape, self.shape[-1]))
        numbers = numbers if keys == _ALL else numbers[(..., keys)]
        return numbers if any(_is_list(item) for item in (*grid, keys)) else self._lent(numbers, (*grid, keys))

    def _cut(self, make: Callable[[], LinearMap], where: tuple[Any, ...], grid: tuple[int, ...]) -> Self:
        """A range of its queries or keys, which follows it, and whose assignments go back into it."""
        cut = self._made(make(), tuple(self._index.shape), grid)
        view = partial(type(self), index=cut._index, grid=grid, place=self._place)
        cut._storage.follow(self._storage, make, lambda storage: self.__setitem__((..., *where), view(storage)))
        return cut

    def _assign_queries(self, span: tuple[int, int, tuple[int, ...]], value: Any) -> None:
        start, stop, shape = span
        lead, rows, queries = tuple(self._index.shape), self.operator, prod(self._grid)
        middle = self._view(self._index, shape)._as_rows(value, lead, "assignment")
        above = [rows.queries(0, start)] if start else []
        below = [rows.queries(stop, queries)] if stop < queries else []
        self._write(stack([*above, middle, *below]))

    def _columns(self, keys: Any) -> torch.Tensor:
        """The numbers of some columns: (*lead, *grid, …)."""
        place = torch.as_tensor(keys)
        flat = _positions(keys, self.shape[-1])
        shape = (*self._index.shape, *self._grid, *place.shape)
        if len(flat) >= self.shape[-1]:
            warn_of_numbers("indexing by as many columns as it has, or more", shape, self.dtype)
        return self._given(self.operator.columns(flat)[:, 0]).reshape(shape)

    def _lent(self, numbers: torch.Tensor, where: tuple[Any, ...]) -> torch.Tensor:
        """Numbers of some entries, which go back into it where they are changed in place."""
        view = partial(type(self), index=self._index, grid=self._grid, place=self._place)
        return self._storage.lend(numbers, lambda storage, new: view(storage).__setitem__((..., *where), new))

    def _scattered(self, value: Any, positions: list[int]) -> LinearMap:
        """``value`` at the columns ``positions`` of a map that is zero elsewhere: [R, 1, N, M]."""
        lead, keys, storage = tuple(self._index.shape), self.shape[-1], self._storage
        queries = prod(self._grid)
        if isinstance(value, MapView):
            if value.shape[-1] != len(positions):
                raise ValueError(f"{value.shape[-1]} columns were assigned to {len(positions)}")
            place = torch.zeros(len(positions), keys, dtype=storage.dtype, device=storage.device)
            place[range(len(positions)), positions] = 1.0
            return converted(value._storage.take(value._index.expand(lead)), storage.dtype).mix(place)
        if not isinstance(value, torch.Tensor | Real):
            raise TypeError(f"expected a map, a tensor or a number to assign, got {type(value).__name__}")
        given = self._of_map(torch.as_tensor(value))
        try:
            given = given.expand(*lead, *self._grid, len(positions))
        except RuntimeError:
            raise ValueError(
                f"cannot assign {tuple(given.shape)} to {(*lead, *self._grid, len(positions))}, the columns "
                f"{positions} of a map of shape {tuple(self.shape)}"
            ) from None
        return known_columns(given.reshape(-1, 1, queries, len(positions)), positions, keys)

    def _assign_numbers(self: Self, key: Any, value: Any) -> None:
        numbers = self.numbers("assignment to lists or to some queries")
        numbers[key] = value.numbers("assignment") if isinstance(value, MapView) else value
        self._write(self._as_rows(numbers, tuple(self._index.shape), "assignment"))


def _is_list(item: Any) -> bool:
    """Whether an index names places one by one, which gives a copy, and no view, of a tensor too."""
    return (
        not isinstance(item, int | slice) and item is not None and item is not Ellipsis and getattr(item, "ndim", 1) > 0
    )


def _width(item: Any) -> int:
    """The axes that an index takes up."""
    return item.ndim if isinstance(item, torch.Tensor) and item.dtype == torch.bool else 1


def _plain(item: Any) -> Any:
    """An int, a slice, a list of ints, or a tensor of several axes."""
    if isinstance(item, torch.Tensor):
        if item.dtype == torch.bool:
            return item.nonzero().flatten().tolist() if item.ndim == 1 else None
        return int(item) if item.ndim == 0 else item.tolist() if item.ndim == 1 else item.cpu()
    if isinstance(item, list | range | tuple):
        listed = list(item)
        return [place for place, on in enumerate(listed) if on] if listed and isinstance(listed[0], bool) else listed
    if isinstance(item, bool):
        return None
    return int(item) if hasattr(item, "__index__") else item


def _whole(grid: tuple[Any, ...]) -> bool:
    return all(isinstance(item, slice) and item == _ALL for item in grid)


def _range(grid: tuple[Any, ...], sizes: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]] | None:
    """(start, stop, axes) where slices of the query axes are one range of the query tokens."""
    if not all(isinstance(item, slice) for item in grid) or not _whole(grid[1:]):
        return None
    start, stop, step = grid[0].indices(sizes[0])
    if step != 1 or stop <= start:
        return None
    across = prod(sizes[1:])
    return start * across, stop * across, (stop - start, *sizes[1:])


def _place(grid: tuple[Any, ...], sizes: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]] | None:
    """The same where the first of the query axes are numbers, and the others whole."""
    given = [item for item in grid if isinstance(item, int)]
    if not given or not _whole(grid[len(given) :]):
        return None
    across = sizes[len(given) :]
    start = int(torch.arange(prod(sizes)).reshape(sizes)[tuple(given)].flatten()[0])
    return start, start + prod(across), across


def _positions(keys: Any, tokens: int) -> list[int]:
    if isinstance(keys, slice):
        return list(range(tokens))[keys]
    listed = [keys] if isinstance(keys, int) else torch.as_tensor(keys).flatten().tolist()
    for place in listed:
        if not -tokens <= place < tokens:
            raise IndexError(f"column {place} is out of range: the map has {tokens}")
    return [place % tokens for place in listed]
