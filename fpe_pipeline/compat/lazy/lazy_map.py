"""``LazyMap``: an attention map in a tensor's clothes, for code that was written for the matrix."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch

from fpe_kernels import LinearMap, concatenate

from .indexing import Indexing
from .shapes import Shapes, plain
from .storage import Storage
from .view import MapView

__all__ = ["LazyMap"]

# Reductions of each query's row that a block of rows at a time is enough for.
_OF_ROWS = (
    "amax",
    "amin",
    "argmax",
    "argmin",
    "max",
    "min",
    "topk",
    "std",
    "var",
    "norm",
    "median",
    "logsumexp",
    "sort",
)
# Of these the axis is the first argument that is not the tensor, or `dim`; of topk the second.
_AXIS = {"topk": 1, "norm": 1}


class LazyMap(Indexing, Shapes):
    """The attention map of a layer as code sees it that was written for the matrix ``[rows · heads, N, M]``.

    Shapes, slices, sums, means, factors, mixing, assigned rows and columns, and products with values are done to the
    map's factors; PyTorch's functions follow. Rows are views, as of a tensor: what is assigned to ``A[4:]`` is in
    ``A``. An operation that needs the numbers (a power, the k largest, lists of indices over several axes) gets them,
    a tensor, with one :class:`MapNumbersWarning` that names the line that asked.

    Args:
        attention: an ``AttentionMap`` [B, H, N, M], or any map [R, 1, N, M] with a head a row.
        halves: batch rows of each part that is kept apart in memory, such as (unconditional, conditional).

    >>> from fpe_kernels import AttentionMap
    >>> A = LazyMap(AttentionMap(torch.randn(2, 4, 9, 8), torch.randn(2, 4, 7, 8)))
    >>> conditional = A[4:]
    >>> conditional[:, :, 2:4] *= 0
    >>> A.shape, conditional.mean(0).shape, A[4:, :, 2].abs().max().item(), (A @ torch.ones(7, 3)).shape
    (torch.Size([8, 9, 7]), torch.Size([9, 7]), 0.0, torch.Size([8, 9, 3]))
    """

    #: Whether the rows hold an unconditional half, of which the second half is the conditional one.
    guided: bool = True
    #: Heads of the layer, where the rows are a layer's own.
    heads: int = 0
    #: (height, width) of its query tokens, where the rows are a layer's own.
    layer_grid: tuple[int, int] | None = None

    def __init__(self, attention: LinearMap | Storage, *args: Any, halves: Sequence[int] = (), **kwargs: Any) -> None:
        if isinstance(attention, Storage):
            super().__init__(attention, *args, **kwargs)
            return
        storage = Storage(attention, halves)
        super().__init__(storage, torch.arange(storage.shape[0]))

    def replace(self, value: Any) -> None:
        """Let it be ``value`` from here on, for all who hold it: what a controller returned."""
        if not (isinstance(value, MapView) and value._storage is self._storage and _same(value._index, self._index)):
            self[...] = value

    @property
    def is_untouched(self) -> bool:
        """Whether it still is the layer's own map."""
        return self._storage.untouched is not None

    @property
    def holds_numbers(self) -> bool:
        """Whether it has been written out, as a sum over steps whose numbers are fewer bytes than its factors."""
        return self._storage.settled

    def keep(self) -> LazyMap:
        """Hold its own rows and no others from here on, in place, as numbers where these are fewer bytes.

        For a map that outlives its layer. Other views of the layer's map stay as they are, and share nothing with it
        any more.
        """
        self._storage = self._storage.kept(self._index)
        self._index = torch.arange(self._storage.shape[0]).reshape(self._index.shape)
        return self

    def copy_(self, value: Any, non_blocking: bool = False) -> LazyMap:
        """All of it assigned."""
        self[...] = value
        return self

    def fill_(self, value: float) -> LazyMap:
        """One number throughout."""
        self[...] = float(value)
        return self

    def zero_(self) -> LazyMap:
        """Zero throughout."""
        return self.fill_(0.0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"a lazy map has no attribute {name!r}, as a tensor has none")
        if not callable(getattr(torch.Tensor, name)):
            return getattr(self.numbers(name), name)

        def method(*args: Any, **kwargs: Any) -> Any:
            return self._by_numbers(name, args, kwargs)

        return method

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        array = self.numbers("numpy").detach().cpu().numpy()
        return array if dtype is None else array.astype(dtype)

    #: That NumPy's numbers leave products with a map to the map, as with a tensor.
    __array_priority__ = torch.Tensor.__array_priority__

    def __dlpack__(self, **options: Any) -> Any:
        return self.numbers("a tensor of it").detach().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return torch.empty(0, device=self.device).__dlpack_device__()

    def __iter__(self) -> Any:
        return iter(self.unbind())

    def __contains__(self, entry: Any) -> bool:
        return entry in self.numbers("a search")

    def __pos__(self) -> LazyMap:
        return self

    def __abs__(self) -> Any:
        return self.numbers("absolute values").abs()

    def __floordiv__(self, other: Any) -> Any:
        return self.numbers("a rounded quotient") // plain(other, "a rounded quotient")

    def __mod__(self, other: Any) -> Any:
        return self.numbers("a remainder") % plain(other, "a remainder")

    def __rpow__(self, other: Any) -> torch.Tensor:
        return other ** self.numbers("an exponent")

    def __rtruediv__(self, other: Any) -> torch.Tensor:
        return other / self.numbers("a divisor")

    def __repr__(self) -> str:
        return (
            f"LazyMap(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', nbytes={self.nbytes}; "
            "its numbers are written out by numbers())"
        )

    def _by_numbers(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in _OF_ROWS:
            place = _AXIS.get(name, 0)
            axis = kwargs.get("dim", args[place] if len(args) > place else -1 if name in ("topk", "sort") else None)
            if isinstance(axis, int) and axis in (-1, self.ndim - 1):
                args = (*args[:place], -1, *args[place + 1 :]) if len(args) > place else args
                kwargs = {**kwargs, "dim": -1} if "dim" in kwargs else kwargs
                return self.by_blocks(name, lambda block: getattr(block, name)(*args, **kwargs))
        numbers = self.numbers(name)
        result = getattr(numbers, name)(*plain(args, name), **plain(kwargs, name))
        if name.endswith("_") and not name.endswith("__"):
            self[...] = numbers
            return self
        return result

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("out", 0) is None:  # which methods do not take
            del kwargs["out"]
        name = getattr(function, "__name__", str(function))
        if name in _FUNCTIONS:
            result = _FUNCTIONS[name](*args, **kwargs)
            if result is not NotImplemented:
                return result
        # A function of torch.nn.functional takes arguments that the method of its name does not.
        is_method = hasattr(torch.Tensor, name) and not getattr(function, "__module__", "").startswith("torch.nn.")
        if isinstance(args[0] if args else None, LazyMap) and is_method:
            own = getattr(args[0], name)
            return own(*args[1:], **kwargs) if callable(own) else own
        return function(*plain(args, name), **plain(kwargs, name))


def _compared(name: str) -> Callable[[Any, Any], Any]:
    def compare(self: LazyMap, other: Any) -> Any:
        return getattr(operator, name)(self.numbers("a comparison"), plain(other, "a comparison"))

    return compare


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(LazyMap, f"__{_name}__", _compared(_name))
LazyMap.__hash__ = object.__hash__  # type: ignore[method-assign]


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.numel() == second.numel() and torch.equal(first.flatten(), second.flatten())


def _add(first: Any, second: Any, *, alpha: float = 1) -> Any:
    return first.add(second, alpha=alpha) if isinstance(first, LazyMap) else second.mul(alpha).add(first)


def _sub(first: Any, second: Any, *, alpha: float = 1) -> Any:
    return first.sub(second, alpha=alpha) if isinstance(first, LazyMap) else second.mul(-alpha).add(first)


def _mul(first: Any, second: Any) -> Any:
    return first.mul(second) if isinstance(first, LazyMap) else second.mul(first)


def _div(first: Any, second: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None or not isinstance(first, LazyMap):
        return NotImplemented
    return first.div(second)


def _matmul(first: Any, second: Any) -> Any:
    return first.matmul(second) if isinstance(first, LazyMap) else second.__rmatmul__(first)


def _cat(maps: Sequence[Any], dim: int = 0) -> Any:
    maps = [one for one in maps if one.numel()] or maps
    first = next((one for one in maps if isinstance(one, LazyMap)), None)
    if first is None:
        return NotImplemented
    axis, depth = dim % first.ndim, first._index.ndim
    same = all(one.ndim == first.ndim and one.shape[depth:] == first.shape[depth:] for one in maps)
    if axis >= depth or not same or (len({one._grid for one in maps if isinstance(one, LazyMap)}) > 1):
        return NotImplemented
    operators, indices, offset = [], [], 0
    first = first.to(reduce(torch.promote_types, (one.dtype for one in maps)))
    for one in maps:
        lead = tuple(one.shape[:depth])
        operators.append(first._as_rows(one, lead, "cat"))
        count = operators[-1].shape[0]
        indices.append(torch.arange(offset, offset + count).reshape(lead))
        offset += count
    return type(first)(Storage(concatenate(operators)), torch.cat(indices, axis), first._grid, first._place)


def _stack(maps: Sequence[Any], dim: int = 0) -> Any:
    rank = maps[0].ndim + 1
    return _cat([one.unsqueeze(dim % rank) for one in maps], dim % rank)


def _like(number: float) -> Callable[..., LazyMap]:
    def like(given: LazyMap, **kwargs: Any) -> LazyMap:
        made = given.mul(0.0).fill_(number)
        return made.to(**{name: kwargs[name] for name in ("dtype", "device") if kwargs.get(name) is not None})

    return like


def _einsum(equation: Any, *operands: Any) -> Any:
    """Products ``… i j, … j d -> … i d`` as numbers, and mixings onto as many tokens as the map has, as maps."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation or len(operands) != 2:
        return NotImplemented
    inputs, output = equation.replace(" ", "").split("->")
    names = inputs.split(",")
    if isinstance(operands[1], LazyMap):
        names, operands = names[::-1], operands[::-1]
    attention, other = operands
    if not isinstance(attention, LazyMap) or isinstance(other, LazyMap):
        return NotImplemented
    mine, theirs = names
    depth, queries, keys = attention._index.ndim, mine[attention._index.ndim : -1], mine[-1]
    new = [name for name in theirs if name not in mine]
    width = [name for name in new if output.endswith(name)]
    batch = [name for name in theirs if name != keys and name not in width]
    fits = len(set(mine)) == len(mine) and keys in theirs and keys not in output and len(width) == 1
    if not fits or any(name in queries for name in batch) or not output.endswith(queries + width[0]):
        return NotImplemented
    lead = output[: -len(queries) - 1]
    if set(lead) != set(mine[:depth]) | set(batch):
        return NotImplemented
    # Both with the output's leading axes, of size 1 where they have none.
    value = other.permute([theirs.index(name) for name in [*batch, keys, width[0]]])
    value = value[_placed(lead, batch)].permute(_order(lead, batch))
    rows = attention.permute([mine.index(name) for name in lead if name in mine] + list(range(depth, attention.ndim)))
    rows = rows[tuple(slice(None) if name in mine else None for name in lead)]
    if value.shape[-1] == attention.shape[-1]:
        return rows.mix(value)
    return rows @ (value if len(queries) == 1 else value.flatten(0, -3) if not batch else value)


def _placed(lead: str, batch: Sequence[str]) -> tuple[Any, ...]:
    """An index that gives axes of size 1 to the leading axes that a tensor has not, after those that it has."""
    return (*(slice(None) for _ in batch), *(None for name in lead if name not in batch), ...)


def _order(lead: str, batch: Sequence[str]) -> list[int]:
    """The permutation that brings what :func:`_placed` gives into the order of ``lead``."""
    there = [*batch, *(name for name in lead if name not in batch)]
    return [there.index(name) for name in lead] + [len(lead), len(lead) + 1]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "__add__", "__radd__"), _add),
    **dict.fromkeys(("sub", "subtract", "__sub__"), _sub),
    "__rsub__": lambda first, second: _sub(second, first),
    "rsub": lambda first, second: _sub(second, first),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__"), _div),
    **dict.fromkeys(("matmul", "__matmul__", "bmm", "mm"), _matmul),
    "__rmatmul__": lambda first, second: _matmul(second, first),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    "einsum": _einsum,
    "zeros_like": _like(0.0),
    "empty_like": _like(0.0),
    "ones_like": _like(1.0),
}
