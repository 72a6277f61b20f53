"""Sums, factors, products and means of lazy maps."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, prod
from numbers import Real
from typing import Any, Self

import torch

from .numbers import BLOCK_BYTES, blocks_of_rows, warn_of_numbers
from .view import MapView, axes_of

__all__ = ["Arithmetic"]


class Arithmetic(MapView):
    """What is linear in a map is done to what it is made from; what is not, to its numbers."""

    def add(self, other: Any, *, alpha: float = 1) -> Any:
        """``A + alpha · other`` for a map, a number, or a tensor of one row that all queries share."""
        if alpha != 1:
            other = other * alpha
        if isinstance(other, MapView):
            wide = torch.promote_types(self.dtype, other.dtype)
            if wide != self.dtype:
                return self.to(wide).add(other)
        lead = self._joint_lead(other)
        if lead is None:
            return self.numbers("adding a tensor that is no map's") + other
        mine = self._storage.take(self._index.expand(lead))
        if isinstance(other, Real) and other == 0:
            return self._made(mine, lead)
        return self._made(mine + self._as_rows(other, lead, "addition"), lead)

    def sub(self, other: Any, *, alpha: float = 1) -> Any:
        """``A - alpha · other``."""
        return self.add(other, alpha=-alpha)

    def neg(self) -> Self:
        """``-A``."""
        return self.mul(-1.0)

    def mul(self, other: Any) -> Any:
        """Times a number; or a tensor that says a factor for each row, head, query or key."""
        if isinstance(other, MapView):
            what = "the product of two maps, entry by entry"
            return self.numbers(what) * other.numbers(what)
        if isinstance(other, Real):
            if not isfinite(other):  # which no map is times; a tensor is
                return self.numbers("the product with a number that is not finite") * other
            return self._made(self.operator.scale_rows(float(other)), tuple(self._index.shape))
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        try:
            whole = torch.broadcast_shapes(other.shape, self.shape)
        except RuntimeError:
            raise ValueError(
                f"{tuple(other.shape)} does not broadcast with a map of shape {tuple(self.shape)}"
            ) from None
        axes = axes_of(other, tuple(whole))
        depth = len(whole) - len(self._grid) - 1
        lead, of_keys = tuple(whole[:depth]), axes[-1] != 1
        of_queries = any(size != 1 for size in axes[depth:-1])
        if (of_keys and of_queries) or tuple(whole[depth:]) != tuple(self.shape[self._index.ndim :]):
            return self.numbers("the product with a tensor, entry by entry") * other
        rows = self._storage.take(self._index.expand(lead))
        weight = self._of_map(other)
        if of_keys:
            weight = weight.expand(*lead, *(1,) * len(self._grid), axes[-1])
            return self._made(rows.scale_columns(weight.reshape(-1, 1, axes[-1])), lead)
        across = self._grid if of_queries else (1,) * len(self._grid)
        return self._made(rows.scale_rows(weight.expand(*lead, *across, 1).reshape(-1, 1, prod(across))), lead)

    def div(self, other: Any, *, rounding_mode: str | None = None) -> Any:
        """Divided by a number, or by a tensor as :meth:`mul` takes it; rounded as a tensor is."""
        if rounding_mode is not None:
            return self.numbers("a rounded quotient").div(other, rounding_mode=rounding_mode)
        if isinstance(other, Real):
            return self.mul(1.0 / float(other))
        if isinstance(other, torch.Tensor):
            return self.mul(other.reciprocal())
        return self.numbers("division by a map") / other

    def pow(self, exponent: Any) -> Any:
        """Its numbers, each to a power; itself for the power 1."""
        if isinstance(exponent, Real) and exponent == 1:
            return self._made(self.operator, tuple(self._index.shape))
        return self.numbers("a power") ** (exponent.numbers("a power") if isinstance(exponent, MapView) else exponent)

    __add__ = __radd__ = add
    __sub__ = sub
    __neg__ = neg
    __mul__ = __rmul__ = mul
    __truediv__ = div
    __pow__ = pow

    def __rsub__(self, other: Any) -> Any:
        return self.neg().add(other)

    def add_(self, other: Any, *, alpha: float = 1) -> Self:
        """:meth:`add` in place, as in a sum over steps: it holds its factors, or its numbers where they are less."""
        self._put(self.add(other, alpha=alpha))
        self._storage.accumulated()
        return self

    def sub_(self, other: Any, *, alpha: float = 1) -> Self:
        """:meth:`sub` in place."""
        return self.add_(other, alpha=-alpha)

    def mul_(self, other: Any) -> Self:
        """:meth:`mul` in place."""
        return self._put(self.mul(other))

    def div_(self, other: Any) -> Self:
        """:meth:`div` in place."""
        return self._put(self.div(other))

    __iadd__, __isub__, __imul__, __itruediv__ = add_, sub_, mul_, div_

    def _put(self, value: Any) -> Self:
        self._write(self._as_rows(value, tuple(self._index.shape), "an operation in place"))
        return self

    def _joint_lead(self, other: Any) -> tuple[int, ...] | None:
        """The leading axes of a sum."""
        depth = len(self._grid) + 1
        if isinstance(other, MapView):
            sizes = other._index.shape
        elif isinstance(other, torch.Tensor):
            sizes = other.shape[:-depth]
        else:
            return tuple(self._index.shape)
        try:
            return tuple(torch.broadcast_shapes(sizes, self._index.shape))
        except RuntimeError:
            raise ValueError(
                f"{tuple(other.shape)} does not broadcast with a map of shape {tuple(self.shape)}"
            ) from None

    def matmul(self, value: Any) -> torch.Tensor:
        """``A @ value`` for value (*lead, M, E), [M, E] or [M]; without the map."""
        if isinstance(value, MapView):
            return self.numbers("the product with another map") @ value.numbers("the product with another map")
        if value.ndim == 1:
            return self.matmul(value[:, None])[..., 0]
        keys, width = value.shape[-2:]
        if keys != self.shape[-1]:
            raise ValueError(f"a map of shape {tuple(self.shape)} takes {self.shape[-1]} tokens, got {keys}")
        sizes = tuple(value.shape[:-2])
        if len(self._grid) > 1 and sizes:
            depth = len(self._grid) - 1
            if any(size != 1 for size in sizes[-depth:]):
                return self.numbers("the product with values that differ from query to query") @ value
            sizes = sizes[:-depth]
        lead = tuple(torch.broadcast_shapes(sizes, self._index.shape))
        given = self._of_map(value.reshape(*sizes, keys, width)).expand(*lead, keys, width)
        index = self._index.expand(lead)
        whole = self._storage.untouched
        if whole is not None and index.numel() == self._storage.shape[0] and _counts(index):
            out = whole @ given.reshape(*whole.shape[:2], keys, width)
        else:
            out = self._storage.take(index) @ given.reshape(-1, 1, keys, width)
        return self._given(out.reshape(*lead, *self._grid, width))

    def __matmul__(self, value: Any) -> torch.Tensor:
        return self.matmul(value)

    def adjoint(self, weight: torch.Tensor) -> torch.Tensor:
        """``A.T @ weight`` for weight (*lead, N, E) or [N, E]: (*lead, M, E); without the map."""
        lead = tuple(torch.broadcast_shapes(weight.shape[:-2], self._index.shape))
        given = self._of_map(weight).expand(*lead, *weight.shape[-2:]).reshape(-1, 1, *weight.shape[-2:])
        out = self._storage.take(self._index.expand(lead)).T @ given
        return self._given(out.reshape(*lead, self.shape[-1], weight.shape[-1]))

    def __rmatmul__(self, other: torch.Tensor) -> torch.Tensor:
        """``other @ A`` for other (*lead, E, N)."""
        if len(self._grid) > 1:
            return other @ self.numbers("a product from the left over several query axes")
        return self.adjoint(other.transpose(-1, -2)).transpose(-1, -2)

    def mix(self, matrix: torch.Tensor) -> Self:
        """``A M`` as a map of other tokens, for matrix (*lead, M, M') or [M, M']: Prompt-to-Prompt's mappers."""
        lead = tuple(torch.broadcast_shapes(matrix.shape[:-2], self._index.shape))
        given = self._of_map(matrix)
        if matrix.ndim > 2:
            given = given.expand(*lead, *matrix.shape[-2:]).reshape(-1, 1, *matrix.shape[-2:])
        return self._made(self._storage.take(self._index.expand(lead)).mix(given), lead)

    def sum(self, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
        """Over rows and heads, a map; over queries or keys, numbers."""
        if dtype is not None and dtype != self.dtype:
            return self.to(dtype).sum(dim, keepdim, axis=axis)
        axes = self._named_axes(dim if axis is None else axis)
        depth, last = self._index.ndim, self.ndim - 1
        of_lead = tuple(axis for axis in axes if axis < depth)
        of_grid = tuple(axis for axis in axes if depth <= axis < last)
        if axes == of_lead:
            return self._sum_of_rows(of_lead, keepdim)
        if last in axes:
            ones = torch.ones(self.shape[-1], 1, dtype=self._storage.dtype, device=self._storage.device)
            rest = self.matmul(ones)
            rest = rest.sum(of_lead + of_grid, keepdim=True) if of_lead + of_grid else rest
        else:
            rest = self._sum_of_queries(of_grid)
            rest = rest.sum(of_lead, keepdim=True) if of_lead else rest
        return rest if keepdim else rest.reshape([size for axis, size in enumerate(rest.shape) if axis not in axes])

    def mean(self, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
        """As :meth:`sum`."""
        axes = self._named_axes(dim if axis is None else axis)
        return self.sum(axes, keepdim, dtype=dtype) / prod(self.shape[axis] for axis in axes)

    def _sum_of_rows(self, axes: tuple[int, ...], keepdim: bool) -> Self:
        kept = [axis for axis in range(self._index.ndim) if axis not in axes]
        sizes = [self._index.shape[axis] for axis in kept]
        index = self._index.permute(*kept, *axes).reshape(prod(sizes), -1)
        total = self._storage.take(index[:, 0])
        for place in range(1, index.shape[1]):
            total = total + self._storage.take(index[:, place])
        lead = [1 if axis in axes else size for axis, size in enumerate(self._index.shape)] if keepdim else sizes
        return self._made(total, tuple(lead))

    def _sum_of_queries(self, axes: tuple[int, ...]) -> torch.Tensor:
        """Summed over some query axes, which remain with size 1."""
        depth, storage = self._index.ndim, self._storage
        left = [1 if depth + place in axes else size for place, size in enumerate(self._grid)]
        cells = torch.arange(prod(left), device=storage.device).reshape(left).expand(self._grid).reshape(-1, 1)
        member = (cells == torch.arange(prod(left), device=storage.device)).to(storage.dtype)  # [N, cells]
        sums = self.adjoint(member).transpose(-1, -2)
        return sums.reshape(*self._index.shape, *left, self.shape[-1])

    def _named_axes(self, dim: Any) -> tuple[int, ...]:
        given = [dim] if isinstance(dim, int) else list(() if dim is None else dim) or range(self.ndim)
        for axis in given:
            if not -self.ndim <= axis < self.ndim:
                raise IndexError(f"dim {axis} is out of range for a map of shape {tuple(self.shape)}")
        return tuple(sorted({axis % self.ndim for axis in given}))

    def by_blocks(self, name: str, function: Callable[[torch.Tensor], Any]) -> Any:
        """What ``function`` makes of each query's row, such as its largest entries, from a block of rows at a time.

        Args:
            name: of the operation, for the warning.
            function: takes (*lead, n, M) and reduces the last axis; gives a tensor, or a named tuple of tensors.
        """
        warn_of_numbers(name, tuple(self.shape), self.dtype, min(BLOCK_BYTES, self.operator.shape.numel() * 4))
        lead, results = tuple(self._index.shape), []
        for _, block in blocks_of_rows(self.operator):
            results.append(function(self._given(block).reshape(*lead, *block.shape[-2:])))

        def joined(parts: list[torch.Tensor]) -> torch.Tensor:
            whole = torch.cat(parts, dim=len(lead))
            return whole.reshape(*lead, *self._grid, *whole.shape[len(lead) + 1 :])

        if isinstance(results[0], torch.Tensor):
            return joined(results)
        return type(results[0])([joined(list(parts)) for parts in zip(*results, strict=True)])


def _counts(index: torch.Tensor) -> bool:
    return index.flatten().tolist() == list(range(index.numel()))
