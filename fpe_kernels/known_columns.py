"""Maps of which some columns are known as numbers, and all others are zero: what is assigned to a map's columns."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import indices, validation
from .composition import LinearMap
from .normal_form import Block, Term, gathered_rows
from .precision import at_given_dtype


def known_columns(columns: Tensor, index: int | Sequence[int] | Tensor, tokens: int) -> LinearMap:
    """A map of ``tokens`` columns that is zero but for those at ``index``, which are ``columns``.

    With it a map's columns are assigned without the map: ``A.scale_columns(others) + known_columns(new, index, M)``,
    where ``others`` is 0 at ``index`` and 1 elsewhere. Equivalent PyTorch, maps dense::

        A = torch.zeros(B, H, N, tokens)
        A[..., index] = columns

    Args:
        columns: [B, H, N, C], float16, bfloat16, float32 or float64.
        index: C positions of keys, [C] as a tensor, in [-tokens, tokens); no two the same.
        tokens: M, the keys of the map.

    Returns:
        The map [B, H, N, M], dtype and device of ``columns``; what it takes is ``columns``. Differentiable in them.

    Raises:
        TypeError, ValueError, IndexError: columns or positions that do not fit.

    >>> A = known_columns(torch.ones(1, 2, 5, 1), 3, tokens=7)
    >>> (A @ torch.ones(1, 2, 7, 4)).allclose(torch.ones(1, 2, 5, 4)), A.column_sums()[0, 0].tolist()
    (True, [0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0])
    """
    columns = validation.check_tensor("columns", columns, "B, H, N, C")
    if isinstance(tokens, bool) or not isinstance(tokens, Integral) or tokens < 0:
        raise ValueError(f"tokens must be the number of the map's keys, an int from 0 on, got {tokens!r}.")
    positions = indices.check_token_index(index, tokens, columns.device)
    if positions.numel() != columns.shape[3]:
        raise ValueError(
            f"index names {positions.numel()} columns, and columns has {columns.shape[3]}: "
            f"{validation.shape_of(columns)}; give one position for each."
        )
    if indices.names_twice(index, positions, tokens):
        raise ValueError(f"index names a column twice: {positions.tolist()}; add what it is given first.")
    return KnownColumns(columns, positions, tokens)


class KnownColumns(LinearMap):
    """See :func:`known_columns`; ``positions`` [C] on the device of ``columns`` [B, H, N, C]."""

    def __init__(self, columns: Tensor, positions: Tensor, tokens: int) -> None:
        self._columns, self._positions, self._tokens = columns, positions, tokens

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._columns.shape[:3], self._tokens))

    @property
    def dtype(self) -> torch.dtype:
        return self._columns.dtype

    @property
    def device(self) -> torch.device:
        return self._columns.device

    @property
    def key_heads(self) -> int:
        return self._columns.shape[1]

    @property
    def nbytes(self) -> int:
        return self._columns.numel() * self._columns.element_size()

    @property
    def requires_grad(self) -> bool:
        """Whether the columns take part in gradients."""
        return self._columns.requires_grad

    def _blocks(self) -> tuple[Block, ...]:
        return (Block((Term(self, tuple(range(self.shape[0]))),)),)

    def gathered_product(self, value: Tensor, index: tuple[int, ...], weight: Tensor | None) -> Tensor:
        """``weight ⊙ (A[index] @ value)`` for value [len(index), H, M, E]."""
        with at_given_dtype(self.device):
            out = gathered_rows(self._columns, index) @ value[:, :, self._positions]
        return out if weight is None else (weight.unsqueeze(-1) * out).to(self.dtype)

    def gathered_adjoint(self, weight: Tensor, index: tuple[int, ...]) -> Tensor:
        """``A[index].T @ weight`` for weight [len(index), H, N, E]."""
        with at_given_dtype(self.device):
            part = gathered_rows(self._columns, index).transpose(-1, -2) @ weight
        whole = part.new_zeros((*part.shape[:2], self._tokens, part.shape[3]))
        return whole.index_copy(2, self._positions, part)

    def queries(self, start: int, stop: int | None = None) -> KnownColumns:
        """The rows of the query tokens ``start`` to ``stop``."""
        start, stop = indices.check_range("query tokens", start, stop, self.shape[2])
        return KnownColumns(self._columns[:, :, start:stop], self._positions, self._tokens)

    def to(self, *args: Any, **kwargs: Any) -> KnownColumns:
        """The same on another device, or in another dtype: moved or converted as ``Tensor.to`` does."""
        columns = self._columns.to(*args, **kwargs)
        return KnownColumns(columns, self._positions.to(columns.device), self._tokens)

    def rows_at(self, index: Tensor) -> Tensor:
        """:meth:`rows`; ``index`` holds positions on the device."""
        part = self._columns[:, :, index]
        return part.new_zeros((*part.shape[:3], self._tokens)).index_copy(3, self._positions, part)

    def __repr__(self) -> str:
        return f"KnownColumns(shape={tuple(self.shape)}, columns={self._positions.numel()}, dtype={self.dtype})"
