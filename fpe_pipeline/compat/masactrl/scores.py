"""``sim``: a layer's scores, for code that was written for the matrix."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch

from fpe_kernels import AttentionMap

from ..lazy import LazyMap
from ..lazy.numbers import warn_of_numbers

__all__ = ["LazyScores"]

_SOFTMAX = ("softmax", "_softmax", "special_softmax")


class LazyScores:
    """Scores [rows · heads, N, M], ``scale · Q Kᵀ + bias``, that are not computed before something needs them.

    Factors, what is added, rows and their halves, and the softmax, which is a `LazyMap`, are done to what they are made
    from; anything else gets the numbers, with one warning that names the line that asked.

    Args:
        query: [R, N, D]; key: [R, M, D].
        scale: a number.
        bias: what is added, broadcastable to [R, N, M].
        backend: of ``fpe_kernels``.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        self._query, self._key, self._scale, self._bias, self._backend = query, key, scale, bias, backend

    @property
    def shape(self) -> torch.Size:
        """(R, N, M)."""
        return torch.Size((*self._query.shape[:2], self._key.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self._query.dtype

    @property
    def device(self) -> torch.device:
        """Of its numbers."""
        return self._query.device

    @property
    def ndim(self) -> int:
        """3."""
        return 3

    def size(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return self.numbers("an index")[index]
        bias = self._bias
        if bias is not None and bias.ndim == 3 and bias.shape[0] > 1:
            bias = bias[index]
        return LazyScores(self._query[index], self._key[index], self._scale, bias, self._backend)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Any, ...]:
        """Parts of the rows."""
        if dim != 0:
            return self.numbers("chunks of tokens").chunk(chunks, dim)
        size = -(-len(self) // chunks)
        return tuple(self[start : start + size] for start in range(0, len(self), size))

    def mul(self, other: Any) -> Any:
        """Times a number."""
        if not isinstance(other, Real) or isinstance(other, bool):
            return self.numbers("a product") * _plain(other)
        bias = None if self._bias is None else self._bias * float(other)
        return LazyScores(self._query, self._key, self._scale * float(other), bias, self._backend)

    def div(self, other: Any) -> Any:
        """Divided by a number."""
        return self.mul(1.0 / float(other)) if isinstance(other, Real) else self.numbers("a quotient") / _plain(other)

    def add(self, other: Any) -> Any:
        """Plus a number, or a tensor that broadcasts to the scores: a mask, or scores of one's own."""
        if isinstance(other, LazyScores):
            other = other.numbers("a sum with other scores")
        if isinstance(other, Real):
            other = torch.full((1, 1, 1), float(other), dtype=self.dtype, device=self.device)
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        torch.broadcast_shapes(other.shape, self.shape)
        other = other.to(self.device, self.dtype)
        bias = other if self._bias is None else self._bias + other
        return LazyScores(self._query, self._key, self._scale, bias, self._backend)

    def softmax(self, dim: int = -1, dtype: Any = None) -> Any:
        """The map, over keys."""
        if dim not in (-1, 2) or dtype is not None:
            return self.numbers("a softmax").softmax(dim, dtype)
        bias = self._bias
        if bias is not None:
            bias = bias.reshape((1,) * (3 - bias.ndim) + bias.shape).unsqueeze(1)
        query, key = self._query.unsqueeze(1), self._key.unsqueeze(1)
        return LazyMap(AttentionMap(query, key, scale=self._scale, bias=bias, backend=self._backend))

    def numbers(self, operation: str = "numbers()") -> torch.Tensor:
        """All of them, a tensor, with a warning that names the line that asks."""
        warn_of_numbers(operation, tuple(self.shape), self.dtype)
        scores = self._scale * (self._query @ self._key.transpose(1, 2))
        return scores if self._bias is None else scores + self._bias

    __mul__ = __rmul__ = mul
    __truediv__ = div
    __add__ = __radd__ = add

    def __sub__(self, other: Any) -> Any:
        return self.add(-other)

    def __neg__(self) -> Any:
        return self.mul(-1.0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"scores have no attribute {name!r}, as a tensor has none")
        return getattr(self.numbers(name), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), dict(kwargs or {})
        first, *others = args
        if name in _SOFTMAX and isinstance(first, LazyScores):
            kwargs = {key: value for key, value in kwargs.items() if key in ("dim", "dtype")}
            return first.softmax(*others[:1], **kwargs)
        if name in ("mul", "__mul__", "__rmul__", "add", "__add__", "__radd__") and not kwargs and len(others) == 1:
            scores, other = (first, others[0]) if isinstance(first, LazyScores) else (others[0], first)
            return getattr(scores, name.strip("_").removeprefix("r"))(other)
        return function(*map(_plain, args), **{key: _plain(value) for key, value in kwargs.items()})


def _plain(given: Any) -> Any:
    """An argument of a function with numbers in the place of scores."""
    if isinstance(given, list | tuple):
        return type(given)(map(_plain, given))
    return given.numbers("a function of tensors") if isinstance(given, LazyScores) else given
