"""Shapes of lazy maps: which row stands where, and how the query axis is cut into a grid; nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Self

import torch

from fpe_kernels import AttentionMap

from .arithmetic import Arithmetic
from .view import MapView

__all__ = ["Shapes", "plain"]


class Shapes(Arithmetic):
    """A tensor's ways to be given another shape. The axis of the keys stays the last, those of the queries together."""

    def size(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of axes."""
        return self.ndim

    def numel(self) -> int:
        """Entries."""
        return prod(self.shape)

    nelement = numel

    def element_size(self) -> int:
        """Bytes of one of its numbers."""
        return self.dtype.itemsize

    def reshape(self, *sizes: Any) -> Any:
        """Other leading axes, and the query axis as a grid such as height × width, or as one again."""
        wanted = _resolved(sizes, self.numel())
        rows, queries = self._index.numel(), prod(self._grid)
        if wanted and wanted[-1] == self.shape[-1]:
            for depth in reversed(range(len(wanted) - 1)):
                if prod(wanted[depth:-1]) == queries and prod(wanted[:depth]) == rows:
                    index = self._index.reshape(wanted[:depth])
                    is_view = index.untyped_storage().data_ptr() == self._index.untyped_storage().data_ptr()
                    reshaped = self._view(index, wanted[depth:-1])
                    return reshaped if is_view else reshaped.clone()  # as of a tensor
        return self.numbers(f"a shape of {list(wanted)}").reshape(wanted)

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        """As a tensor's."""
        start, end = start_dim % self.ndim, end_dim % self.ndim
        return self.reshape(*self.shape[:start], prod(self.shape[start : end + 1]), *self.shape[end + 1 :])

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Any:
        """As a tensor's."""
        axis = dim % self.ndim
        return self.reshape(*self.shape[:axis], *_resolved((sizes,), self.shape[axis]), *self.shape[axis + 1 :])

    def unsqueeze(self, dim: int) -> Any:
        """As a tensor's."""
        axis = dim % (self.ndim + 1)
        if axis <= self._index.ndim:
            return self._view(self._index.unsqueeze(axis))
        return self.reshape(*self.shape[:axis], 1, *self.shape[axis:])

    def squeeze(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        axes = range(self.ndim) if dim is None else [dim % self.ndim]
        return self.reshape([size for axis, size in enumerate(self.shape) if axis not in axes or size != 1])

    def expand(self, *sizes: Any) -> Any:
        """As a tensor's, of leading axes."""
        wanted = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else list(sizes)
        own = [1] * (len(wanted) - self.ndim) + list(self.shape)
        wanted = [size if given == -1 else given for given, size in zip(wanted, own, strict=True)]
        depth = len(wanted) - len(self._grid) - 1
        if wanted[depth:] != own[depth:]:
            return self.numbers("expanded queries or keys").expand(wanted)
        return self._view(self._index.expand(wanted[:depth]))

    def expand_as(self, other: Any) -> Any:
        """As a tensor's."""
        return self.expand(other.shape)

    def repeat(self, *times: Any) -> Any:
        """As a tensor's, of leading axes."""
        given = list(times[0]) if len(times) == 1 and not isinstance(times[0], int) else list(times)
        depth = len(given) - len(self._grid) - 1
        if any(number != 1 for number in given[depth:]):
            return self.numbers("repeated queries or keys").repeat(given)
        return self._copied(self._index.repeat(given[:depth]))

    def repeat_interleave(self, repeats: int, dim: int | None = None) -> Any:
        """As a tensor's, of a leading axis."""
        if dim is None or not isinstance(repeats, int) or dim % self.ndim >= self._index.ndim:
            return self.numbers("repeated entries").repeat_interleave(repeats, dim)
        return self._copied(self._index.repeat_interleave(repeats, dim % self.ndim))

    def permute(self, *dims: Any) -> Any:
        """As a tensor's, of leading axes."""
        given = list(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else list(dims)
        axes = [axis % self.ndim for axis in given]
        depth = self._index.ndim
        if axes[depth:] != list(range(depth, self.ndim)):
            return self.numbers("queries or keys in other places").permute(axes)
        return self._view(self._index.permute(axes[:depth]))

    def transpose(self, dim0: int, dim1: int) -> Any:
        """As a tensor's, of leading axes; ``A.transpose(-1, -2) @ w`` is a product too."""
        first, second = sorted((dim0 % self.ndim, dim1 % self.ndim))
        if (first, second) == (self.ndim - 2, self.ndim - 1) and len(self._grid) == 1:
            return TransposedView(self)
        axes = list(range(self.ndim))
        axes[first], axes[second] = second, first
        return self.permute(axes)

    @property
    def mT(self) -> Any:
        """The last two axes swapped."""
        return self.transpose(-1, -2)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Any, ...]:
        """As a tensor's."""
        return self.split(-(-self.shape[dim] // chunks), dim)

    def split(self, split_size: Any, dim: int = 0) -> tuple[Any, ...]:
        """As a tensor's."""
        axis, total = dim % self.ndim, self.shape[dim]
        if isinstance(split_size, int):
            split_size = [min(split_size, total - start) for start in range(0, total, split_size)]
        parts, start = [], 0
        for size in split_size:
            parts.append(self[(slice(None),) * axis + (slice(start, start + size),)])  # type: ignore[index]
            start += size
        return tuple(parts)

    def unbind(self, dim: int = 0) -> tuple[Any, ...]:
        """As a tensor's."""
        axis = dim % self.ndim
        return tuple(self[(slice(None),) * axis + (place,)] for place in range(self.shape[axis]))  # type: ignore[index]

    def select(self, dim: int, index: int) -> Any:
        """As a tensor's."""
        return self[(slice(None),) * (dim % self.ndim) + (int(index),)]  # type: ignore[index]

    def narrow(self, dim: int, start: int, length: int) -> Any:
        """As a tensor's."""
        return self[(slice(None),) * (dim % self.ndim) + (slice(start, start + length),)]  # type: ignore[index]

    def index_select(self, dim: int, index: torch.Tensor) -> Any:
        """As a tensor's."""
        axis = dim % self.ndim
        part = self[(slice(None),) * axis + (index,)]  # type: ignore[index]
        return part.clone() if isinstance(part, Shapes) else part

    def contiguous(self, **_: Any) -> Self:
        """Itself, or a copy of rows in another order, as of a tensor."""
        return self if self._index.is_contiguous() else self.clone()

    def detach(self) -> Any:
        """Itself where no gradient goes through it; else its numbers, detached."""
        if torch.is_grad_enabled() and self.requires_grad:
            return self.numbers("detach() of a map with gradients").detach()
        return self._view(self._index)

    @property
    def requires_grad(self) -> bool:
        """Whether what it is made from takes part in gradients."""
        whole = self._storage.untouched
        if isinstance(whole, AttentionMap):  # asked of every layer of a map that nobody has changed
            return torch.is_grad_enabled() and (whole.query.requires_grad or whole.key.requires_grad)
        one = torch.zeros(self.shape[-1], 1, dtype=self._storage.dtype, device=self._storage.device)
        return bool((self._storage.rows @ one.expand(self._storage.shape[0], 1, -1, -1)).requires_grad)

    def cpu(self) -> Self:
        """:meth:`to` the host."""
        return self.to("cpu")

    def cuda(self, device: Any = "cuda") -> Self:
        """:meth:`to` a GPU."""
        return self.to(device)

    def float(self) -> Self:
        """:meth:`to` float32."""
        return self.to(torch.float32)

    def half(self) -> Self:
        """:meth:`to` float16."""
        return self.to(torch.float16)

    def double(self) -> Self:
        """:meth:`to` float64."""
        return self.to(torch.float64)

    def bfloat16(self) -> Self:
        """:meth:`to` bfloat16."""
        return self.to(torch.bfloat16)

    def _copied(self, index: torch.Tensor) -> Self:
        return self._view(index).clone()


class TransposedView:
    """``A.transpose(-1, -2)``, (*lead, M, N): its products are those of the adjoint."""

    def __init__(self, original: Shapes) -> None:
        self._original = original

    @property
    def shape(self) -> torch.Size:
        """(*lead, M, N)."""
        *lead, queries, keys = self._original.shape
        return torch.Size((*lead, keys, queries))

    def transpose(self, dim0: int, dim1: int) -> Any:
        """The map again, of the last two axes; else the numbers'."""
        if {dim0 % self.ndim, dim1 % self.ndim} == {self.ndim - 1, self.ndim - 2}:
            return self._original
        return self.numbers("transposed axes").transpose(dim0, dim1)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._original.ndim

    @property
    def mT(self) -> Shapes:
        """The map again."""
        return self._original

    def numbers(self, operation: str = "numbers()") -> torch.Tensor:
        """All of its numbers."""
        return self._original.numbers(operation).transpose(-1, -2)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"a transposed map has no attribute {name!r}")
        return getattr(self.numbers(name), name)

    def __matmul__(self, weight: Any) -> torch.Tensor:
        return self._original.adjoint(plain(weight, "a product of two maps"))

    matmul = __matmul__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.matmul, torch.bmm) and isinstance(args[0], TransposedView):
            return args[0] @ args[1]
        name = getattr(function, "__name__", str(function))
        return function(*plain(args, name), **plain(kwargs or {}, name))


def _by_numbers(name: str) -> Callable[..., Any]:
    def method(self: TransposedView, *args: Any) -> Any:
        return getattr(self.numbers("transposed axes"), name)(*plain(args, "transposed axes"))

    return method


for _name in (
    *("__getitem__", "__len__", "__iter__", "__neg__", "__abs__", "__pow__", "__lt__", "__le__", "__gt__", "__ge__"),
    *(f"__{side}{of}__" for side in ("", "r") for of in ("add", "sub", "mul", "truediv")),
):
    setattr(TransposedView, _name, _by_numbers(_name))


def plain(given: Any, name: str) -> Any:
    """Arguments of a function with numbers in the place of maps."""
    if isinstance(given, MapView | TransposedView):
        return given.numbers(name)
    if isinstance(given, dict):
        return {key: plain(value, name) for key, value in given.items()}
    if isinstance(given, list | tuple) and not isinstance(given, torch.Size):
        return type(given)(plain(value, name) for value in given)
    return given


def _resolved(sizes: Sequence[Any], total: int) -> tuple[int, ...]:
    """Sizes as a tensor's ``reshape`` takes them, with the one that is left open."""
    given = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else list(sizes)
    given = [int(size) for size in given]
    if -1 in given:
        known = prod(size for size in given if size != -1)
        given[given.index(-1)] = total // known if known else 0
    if prod(given) != total:
        raise RuntimeError(f"shape {list(sizes)} does not hold the {total} entries of the map")
    return tuple(given)
