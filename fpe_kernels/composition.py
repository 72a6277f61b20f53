"""Linear algebra of attention maps: sums, weights, token mixing and gathers of maps that are never stored.

Every edit of attention maps in the literature is such a combination, and a combination is known by its products: it is
kept in the normal form of :mod:`.normal_form`, which every operation rewrites.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import indices, validation
from .normal_form import (
    Block,
    Diagonal,
    Factor,
    Mixing,
    Padding,
    Term,
    adjoint_of,
    bytes_of,
    columns_at_once,
    product_of,
    rows_of,
    some_rows,
    sum_of_blocks,
    taken,
    terms_by_map,
    tokens_after,
)
from .ranges import KeyBlock, once_for_each
from .softmax_map import SoftmaxMap, softmax_blocks
from .views import MapViews


class LinearMap(MapViews):
    """A linear operator [B, H, N, M] from key tokens to query tokens, known by its products.

    ``AttentionMap`` is one; sums, weighted, mixed and gathered maps are others. Equivalent PyTorch, every map dense::

        (A + B) @ v                 (A + B) @ v
        A.scale_rows(w) @ v         w.unsqueeze(-1) * (A @ v)
        A.scale_columns(c) @ v      A @ (c.unsqueeze(-1) * v)
        A.mix(M) @ v                A @ (M @ v)
        A.take([0, 0, 1]) @ v       A[[0, 0, 1]] @ v
        blend(w, A, B) @ v          w.unsqueeze(-1) * (A @ v) + (1 - w).unsqueeze(-1) * (B @ v)
        A.queries(i, j) @ v         A[:, :, i:j] @ v
        A.block(keys=(i, j)) @ v    A[..., i:j] @ v

    >>> from fpe_kernels import AttentionMap
    >>> source, target = (AttentionMap(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)) for _ in range(2))
    >>> rows = (0.3 * source + 0.7 * target) @ torch.ones(1, 2, 7, 1)
    >>> rows.allclose(torch.ones(1, 2, 5, 1))
    True
    """

    # What NumPy would make of ``array * A`` is an array of maps, one for each of its numbers.
    __array_ufunc__ = None

    @property
    def key_heads(self) -> int:
        """Heads that a value may have instead of H: those of the keys, where query heads share them."""
        terms = [term for block in self._blocks() for term in block.terms]
        heads = {self.shape[1] if term.factors else term.map.key_heads for term in terms}
        return heads.pop() if len(heads) == 1 else self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of what defines it: of its distinct maps, weights and mixings."""
        return bytes_of(self._blocks())

    @abstractmethod
    def _blocks(self) -> tuple[Block, ...]:
        """The normal form."""

    def matmul(self, value: Any) -> Any:
        """``A @ value`` as a call.

        ``torch.compile`` traces it whatever the operand; of ``@`` it traces tensors whose width is not the number of
        query tokens, no tuples, and PyTorch versions may differ.

        Args:
            value: [B, H, M, E], dtype and device of the map; or a tuple of such, of whatever widths E.

        Returns:
            [B, H, N, E]; a tuple for a tuple, from one pass over the scores.
        """
        return columns_at_once(self._product, value, self._check_value)

    def __matmul__(self, value: Any) -> Any:
        """``A @ value``: [B, H, M, E] -> [B, H, N, E]. A tuple gives a tuple, from one pass over the scores."""
        return self.matmul(value)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What PyTorch's functions make of a map: ``torch.matmul`` a product, all others an error."""
        return _as_traced(function, args, kwargs)

    def _check_value(self, value: object) -> Tensor:
        return validation.check_value(value, self, self.shape, self.key_heads)

    def _product(self, value: Tensor) -> Tensor:
        return product_of(self._blocks(), value)

    @property
    def T(self) -> TransposedMap:
        """The adjoint: ``A.T @ weight``, [B, H, N, E] -> [B, H, M, E]."""
        return TransposedMap(self)

    def queries(self, start: int, stop: int | None = None) -> LinearMap:
        """The rows of the query tokens ``start`` to ``stop`` (N if None) as a map [B, H, stop - start, M].

        Nothing is copied, and a product costs as much as it has rows.
        """
        start, stop = indices.check_range("query tokens", start, stop, self.shape[2])
        part = once_for_each(lambda whole: whole.queries(start, stop))
        return self._with_terms(lambda term, rows: term.of_queries(part(term.map), start, stop))

    def keys(self, start: int, stop: int | None = None) -> LinearMap:
        """The softmax over the key tokens ``start`` to ``stop`` (M if None) alone: [B, H, N, stop - start].

        Rows sum to one again; for the entries as they are, :meth:`block`.

        Raises:
            TypeError: for a map that is not one softmax in each row, such as a sum of maps.
        """
        start, stop = indices.check_range("key tokens", start, stop, self.shape[3], empty=True)
        softmax_blocks(self, "keys(start, stop) is a softmax of its own; for the entries as they are use block(keys=)")
        part = once_for_each(lambda whole: whole.keys(start, stop))
        return self._with_terms(lambda term, rows: replace(term, map=part(term.map)))

    def block(
        self, queries: tuple[int, int | None] | None = None, keys: tuple[int, int | None] | None = None
    ) -> LinearMap:
        """The entries of some query tokens and some key tokens, as they are: ``A[:, :, i:j, k:l]``, still a map.

        A product reads the queries and keys of the block only, and the log-sum-exp of its rows over all keys.

        Args:
            queries: start and stop of the query tokens; None for all.
            keys: start and stop of the key tokens; None for all.
        """
        part = self if queries is None else self.queries(*indices.check_pair("query tokens", queries))
        if keys is None:
            return part
        tokens = self.shape[3]
        start, stop = indices.check_range("key tokens", *indices.check_pair("key tokens", keys), tokens, empty=True)
        of_keys = once_for_each(lambda whole: KeyBlock(whole, start, stop))

        def change(term: Term, rows: slice) -> Term:
            if term.factors or not isinstance(term.map, SoftmaxMap):
                return term.followed_by(Padding(start, stop, tokens))
            return replace(term, map=of_keys(term.map))

        return part._with_terms(change)

    def __add__(self, other: Any) -> LinearMap:
        """``A + B``: maps of one shape, dtype and device."""
        if not isinstance(other, LinearMap):
            return NotImplemented
        validation.check_same_map(self, other)
        return Combination(sum_of_blocks(self._blocks(), other._blocks()))

    def __sub__(self, other: Any) -> LinearMap:
        if not isinstance(other, LinearMap):
            return NotImplemented
        return self + other.scale_rows(-1.0)

    def __neg__(self) -> LinearMap:
        return self.scale_rows(-1.0)

    def __mul__(self, weight: Any) -> LinearMap:
        """``A * number``; a tensor could mean rows or columns, so it takes a method."""
        if isinstance(weight, Tensor):
            raise TypeError(
                "A * tensor does not say what it weights: write tensor * A or A.scale_rows(tensor) for the query "
                "rows, A.scale_columns(tensor) for the key columns."
            )
        return self.scale_rows(weight)

    def __rmul__(self, weight: Any) -> LinearMap:
        """``weight * A``: :meth:`scale_rows`."""
        return self.scale_rows(weight)

    def scale_rows(self, weight: float | Sequence[float] | Tensor) -> LinearMap:
        """``diag(weight) A``: each query's row times a number, ``weight ⊙ (A @ v)``.

        ``torch.compile`` traces it whatever the weight; of ``weight * A`` it traces tensors whose width is not the
        number of key tokens.

        Args:
            weight: a number; a list of B numbers, one for each batch row; or a tensor that broadcasts to [B, H, N], as
                [N] for one of every query pixel does; dtype of the map or of its statistics (float32).
        """
        if isinstance(weight, (int, float)) and not isinstance(weight, bool):
            number = validation.finite_number("weight", weight)
            return self._with_terms(lambda term, rows: replace(term, number=term.number * number))
        checked = validation.check_row_weight(weight, self, self.shape)
        return self._with_terms(lambda term, rows: term.weighted(some_rows(checked, rows)))

    def scale_columns(self, weight: float | Tensor) -> LinearMap:
        """``A diag(weight)``: each key's column times a number, ``A @ (weight ⊙ v)``; rows are not renormalised.

        Args:
            weight: a number, or a tensor that broadcasts to [B, H, M], as [M] for one of every word does.
        """
        if isinstance(weight, Real) and not isinstance(weight, bool):
            return self.scale_rows(validation.finite_number("weight", weight))
        checked = validation.check_column_weight(weight, self, self.shape)
        return self._with_terms(lambda term, rows: term.followed_by(Diagonal(some_rows(checked, rows).unsqueeze(-1))))

    def mix(self, matrix: Tensor) -> LinearMap:
        """``A M``: attention to M keys becomes attention to M' tokens, ``A @ (M @ v)``.

        Args:
            matrix: [M, M'], or with leading axes that broadcast to [B, H, M, M'].

        Returns:
            A map [B, H, N, M'].
        """
        checked = validation.check_mixing(matrix, self, self.shape)
        return self._with_terms(lambda term, rows: term.followed_by(Mixing(some_rows(checked, rows))))

    def take(self, index: Sequence[int]) -> LinearMap:
        """Gather batch rows: row ``b`` of the result is row ``index[b]``. Rows that share a map are computed once."""
        index = indices.check_map_index(index, self.shape[0], "index")
        if not index:
            raise ValueError("A.take([]) has no batch row; name at least one.")
        return Combination(taken(self._blocks(), index))

    def _followed_by(self, factor: Factor) -> LinearMap:
        return self._with_terms(lambda term, rows: term.followed_by(factor))

    def _with_terms(self, change: Callable[[Term, slice], Term]) -> LinearMap:
        blocks, start = [], 0
        for block in self._blocks():
            rows = slice(start, start + block.rows)
            blocks.append(Block(tuple(change(term, rows) for term in block.terms)))
            start = rows.stop
        return Combination(tuple(blocks))


class Combination(LinearMap):
    """A map in normal form; operations on maps make it."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        self._normal_form = blocks
        term = blocks[0].terms[0]
        _, heads, queries, keys = term.map.shape
        keys = tokens_after(term.factors, keys)
        self._shape = torch.Size((sum(block.rows for block in blocks), heads, queries, keys))

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._normal_form[0].terms[0].map.dtype

    @property
    def device(self) -> torch.device:
        return self._normal_form[0].terms[0].map.device

    def _blocks(self) -> tuple[Block, ...]:
        return self._normal_form

    def to(self, *args: Any, **kwargs: Any) -> LinearMap:
        """The same on another device, or in another dtype: attention maps with their weights and mixings, moved or
        converted as ``Tensor.to`` does.

        Raises:
            TypeError: a part that is no attention map, such as a joined one.
        """

        def moved(whole: Any) -> Any:
            if not hasattr(whole, "to"):
                raise TypeError(f"a combination of {type(whole).__name__} stays on its device: move the maps it is of")
            return whole.to(*args, **kwargs)

        once = once_for_each(moved)
        return self._with_terms(lambda term, rows: _moved(term, once(term.map), lambda part: part.to(*args, **kwargs)))

    def rows_at(self, index: Tensor) -> Tensor:
        """:meth:`rows`, from those of its maps; ``index`` holds positions on the device."""
        return rows_of(self._normal_form, index)

    def __repr__(self) -> str:
        terms = sum(len(block.terms) for block in self._normal_form)
        maps = len(terms_by_map([term for block in self._normal_form for term in block.terms]))
        return (
            f"Combination(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', terms={terms}, "
            f"maps={maps})"
        )


def _moved(term: Term, whole: Any, move: Callable[[Tensor], Tensor]) -> Term:
    def factor(given: Factor) -> Factor:
        if isinstance(given, Diagonal):
            return Diagonal(move(given.weight))
        return Mixing(move(given.matrix)) if isinstance(given, Mixing) else given

    weight = None if term.row_weight is None else move(term.row_weight)
    return replace(term, map=whole, row_weight=weight, factors=tuple(map(factor, term.factors)))


class TransposedMap:
    """The adjoint of a :class:`LinearMap`; ``A.T`` makes it."""

    def __init__(self, linear_map: LinearMap) -> None:
        self.T = linear_map

    @property
    def shape(self) -> torch.Size:
        """(B, H, M, N)."""
        batch, heads, queries, keys = self.T.shape
        return torch.Size((batch, heads, keys, queries))

    @property
    def dtype(self) -> torch.dtype:
        """That of the map."""
        return self.T.dtype

    @property
    def device(self) -> torch.device:
        """That of the map."""
        return self.T.device

    def __repr__(self) -> str:
        return f"{self.T!r}.T"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As that of :class:`LinearMap`."""
        return _as_traced(function, args, kwargs)

    def matmul(self, weight: Any) -> Any:
        """``A.T @ weight`` as a call; as :meth:`LinearMap.matmul`, it is what ``torch.compile`` traces in every case.

        Args:
            weight: [B, H, N, E], dtype and device of the map; or a tuple of such, of whatever widths E.

        Returns:
            [B, H, M, E]; a tuple for a tuple, from one pass over the scores.
        """
        return columns_at_once(
            lambda whole: adjoint_of(self.T._blocks(), whole),
            weight,
            lambda part: validation.check_weight(part, self.T, self.T.shape),
        )

    def __matmul__(self, weight: Any) -> Any:
        """``A.T @ weight``: [B, H, N, E] -> [B, H, M, E]. A tuple gives a tuple."""
        return self.matmul(weight)


def _as_traced(function: Any, args: Any, keywords: Any) -> Any:
    """``torch.matmul`` of a map, and what ``torch.compile`` makes of ``A @ value`` and ``weight * A``.

    There an operator between a map and a tensor is a method of the tensor, whichever stood first; in ``torch.export``
    it is itself, with its operands in their order.
    """
    if function in (operator.matmul, operator.mul):
        first, second = args
        if function is operator.mul:
            return second.scale_rows(first) if isinstance(second, LinearMap) else NotImplemented
        return first.matmul(second) if isinstance(first, (LinearMap, TransposedMap)) else NotImplemented
    if function is Tensor.mul and torch.compiler.is_compiling():
        weight, whole = args
        if isinstance(whole, LinearMap):
            # ``A * weight`` arrives alike, and might mean the columns: only what can be no weight of them is taken.
            if weight.ndim > 0 and weight.shape[-1] == whole.shape[3]:
                raise TypeError("torch.compile cannot tell weight * A and A * weight apart: write A.scale_rows(w).")
            return whole.scale_rows(weight)
    if function not in (torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__) or len(args) != 2:
        return NotImplemented
    if keywords and keywords.get("out") is not None:
        raise TypeError(
            "torch.matmul of a map takes no out=: its product is a tensor of its own. Copy it: out.copy_(A @ value)."
        )
    first, second = args
    if isinstance(first, (LinearMap, TransposedMap)):
        return first.matmul(second)
    if not torch.compiler.is_compiling():
        return NotImplemented  # value @ A
    if first.shape[-1] == second.shape[2]:
        raise TypeError("torch.compile cannot tell A @ value from value @ A here: write A.matmul(value).")
    return second.matmul(first)
