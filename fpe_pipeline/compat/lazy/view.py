"""A view of some rows of a storage, in a tensor's shape: what every operation on a lazy map is made of."""

from __future__ import annotations

from math import prod
from numbers import Real
from typing import Any, Self

import torch

from fpe_kernels import LinearMap, known_columns

from .numbers import as_known, converted, entries, warn_of_numbers
from .storage import Storage

__all__ = ["MapView", "axes_of"]


class MapView:
    """Rows of a storage in the shape ``(*lead, *grid, M)``.

    Args:
        storage: of the rows.
        index: [*lead], int64 on the host: for each leading position, which row of the storage stands there.
        grid: the axes of the query tokens, whose product is N; default: one.
        place: device and dtype that its numbers are given on and in; default: the map's.
    """

    def __init__(
        self,
        storage: Storage,
        index: torch.Tensor,
        grid: tuple[int, ...] | None = None,
        place: tuple[torch.device, torch.dtype] | None = None,
    ) -> None:
        self._storage, self._index = storage, index
        self._grid = (storage.shape[1],) if grid is None else grid
        self._place = (storage.device, storage.dtype) if place is None else place

    @property
    def shape(self) -> torch.Size:
        """As a tensor's."""
        return torch.Size((*self._index.shape, *self._grid, self._storage.shape[2]))

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self._place[1]

    @property
    def device(self) -> torch.device:
        """Of its numbers."""
        return self._place[0]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def operator(self) -> LinearMap:
        """Its rows as a map of ``fpe_kernels`` [R, 1, N, M], R the product of the leading axes."""
        return self._storage.take(self._index)

    @property
    def nbytes(self) -> int:
        """Bytes of what it is made from."""
        return self.operator.nbytes

    def _view(self, index: torch.Tensor, grid: tuple[int, ...] | None = None) -> Self:
        """The same storage, other rows."""
        return type(self)(self._storage, index, self._grid if grid is None else grid, self._place)

    def _made(self, rows: LinearMap, lead: tuple[int, ...], grid: tuple[int, ...] | None = None) -> Self:
        """A map of its own, of rows [R, 1, N, M]."""
        index = torch.arange(prod(lead)).reshape(lead)
        return type(self)(Storage(rows), index, self._grid if grid is None else grid, self._place)

    def _write(self, rows: LinearMap) -> None:
        """Assign all of it, in place."""
        if self._index.unique().numel() != self._index.numel():
            raise RuntimeError("expanded rows stand for one another and cannot be assigned: clone() the map first")
        self._storage.assign(self._index, rows)

    def numbers(self, operation: str = "numbers()") -> torch.Tensor:
        """All of its numbers, a tensor of its shape, with a warning that names the line that asks."""
        warn_of_numbers(operation, tuple(self.shape), self.dtype)
        return self._given(entries(self.operator).reshape(self.shape))

    def clone(self, **_: Any) -> Self:
        """A map of its own: what is assigned to it leaves this one as it is."""
        clone = self._made(self.operator, tuple(self._index.shape))
        clone._storage.settled = self._storage.settled
        return clone

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same map, whose numbers are given on another device or in another dtype: a map of its own, as a tensor's
        copy is, or itself where nothing is other. A wider dtype is computed in from there on.
        """
        now = torch.empty(0, device=self.device, dtype=self.dtype)
        like = now.to(*args, **kwargs)
        if like is now:
            return self._view(self._index)
        rows = converted(self.operator, torch.promote_types(self._storage.dtype, like.dtype))
        moved = self._made(rows, tuple(self._index.shape))
        moved._storage.settled = self._storage.settled
        moved._place = (like.device, like.dtype)
        return moved

    def _given(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.to(*self._place)

    def _of_map(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor where the map computes, in its dtype."""
        return tensor.to(self._storage.device, self._storage.dtype)

    def _as_rows(self, other: Any, lead: tuple[int, ...], what: str) -> LinearMap:
        """``other``, broadcast to (*lead, *grid, M), as a map [R, 1, N, M]."""
        storage, count = self._storage, prod(lead)
        queries, keys = prod(self._grid), storage.shape[2]
        if isinstance(other, MapView):
            if prod(other._grid) != queries or other._storage.shape[2] != keys:
                raise ValueError(f"{what}: maps of shapes {tuple(self.shape)} and {tuple(other.shape)} do not fit")
            return converted(other._storage.take(_broadcast(other._index, lead, what)), storage.dtype)
        if isinstance(other, Real):
            column = torch.full((1, 1, 1, keys), float(other), dtype=storage.dtype, device=storage.device)
            return self._same_rows(column, count, queries)
        if not isinstance(other, torch.Tensor):
            raise TypeError(f"{what}: expected a map, a tensor or a number, got {type(other).__name__}")
        other = self._of_map(other)
        whole = (*lead, *self._grid, keys)
        try:
            torch.broadcast_shapes(other.shape, whole)
            if other.numel() == keys or all(size == 1 for size in axes_of(other, whole)[len(lead) : -1]):
                columns = other.expand(torch.broadcast_shapes(other.shape, (*lead, *(1,) * len(self._grid), keys)))
                return self._same_rows(columns.reshape(count, 1, 1, keys), count, queries)
            numbers = other.expand(whole)
        except RuntimeError:
            raise ValueError(f"{what}: {tuple(other.shape)} does not broadcast to {whole}") from None
        return as_known(numbers.reshape(count, queries, keys))

    def _same_rows(self, columns: torch.Tensor, count: int, queries: int) -> LinearMap:
        """[R, 1, N, M] with the same numbers [1 | R, 1, 1, M] at every query: of rank one."""
        ones = self._storage_ones(count, queries)
        return known_columns(ones, [0], 1).mix(columns)

    def _storage_ones(self, count: int, queries: int) -> torch.Tensor:
        storage = self._storage
        return torch.ones((1, 1, 1, 1), dtype=storage.dtype, device=storage.device).expand(count, 1, queries, 1)


def axes_of(tensor: torch.Tensor, whole: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of a tensor with leading ones, as many as ``whole`` has."""
    return (1,) * (len(whole) - tensor.ndim) + tuple(tensor.shape)


def _broadcast(index: torch.Tensor, lead: tuple[int, ...], what: str) -> torch.Tensor:
    try:
        return index.expand(lead)
    except RuntimeError:
        raise ValueError(f"{what}: leading axes {tuple(index.shape)} do not broadcast to {lead}") from None
