"""What a row of a replaced layer becomes: a sum of attention maps times values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["AttentionCall", "Product", "ProductPlan", "plan_products"]


@dataclass(frozen=True)
class Product:
    """One term of a row's output, in rows of the batch::

        weight ⊙ softmax(scale · q[query] @ k[keys]ᵀ) @ (mixing @ v[values])

    where ``k[keys]`` and ``v[values]`` stand for the rows' tokens, one row's after the other's.

    ====================================  =================================================================
    an unedited row ``b``                 ``Product(b, (b,), (b,))``
    Free-Prompt-Editing, Plug-and-Play    ``Product(source, (source,), (target,))``
    MasaCtrl                              ``Product(target, (source,), (source,))``
    StyleAligned                          ``Product(b, (source, b), (source, b))``
    soft or regional Free-Prompt-Editing  ``Product(source, (source,), (target,), weight=a)`` and
                                          ``Product(target, (target,), (target,), weight=1 - a)``
    Prompt-to-Prompt                      ``Product(source, (source,), (target,), mixing=M @ diag(a))`` and
                                          ``Product(target, (target,), (target,), mixing=diag(1 - a))``
    ====================================  =================================================================

    Args:
        query: the row that asks.
        keys: the rows whose keys make the map.
        values: the rows whose values the map is applied to.
        weight: a number, or a tensor with a weight for each query token [N].
        mixing: a matrix applied to the values' tokens [M, M'], or one for each head [H, M, M'].
    """

    query: int
    keys: tuple[int, ...]
    values: tuple[int, ...]
    weight: float | torch.Tensor = 1.0
    mixing: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.mixing is None and len(self.keys) != len(self.values):
            raise ValueError(f"a map over {self.keys} cannot be applied to the values of {self.values} without mixing")


@dataclass(frozen=True)
class AttentionCall:
    """One call of ``shared_attention``: the distinct maps, and the products that use them."""

    maps: tuple[tuple[int, tuple[int, ...]], ...]
    products: tuple[Product, ...]
    map_index: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the call's output is already the layer's: a product a row, in order, unweighted."""
        return self.rows == tuple(range(len(self.rows))) and all(_is_one(p.weight) for p in self.products)


@dataclass(frozen=True)
class ProductPlan:
    """A layer's products, arranged for computing: which rows to project, and which calls to make."""

    rows: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    values: tuple[int, ...]
    calls: tuple[AttentionCall, ...]


def plan_products(products: Mapping[int, Product | Sequence[Product]], rows: int) -> ProductPlan:
    """Arrange an edit's products; rows that it does not name keep their own map and values.

    Raises:
        ValueError: a row outside the batch.
    """
    terms: list[tuple[int, Product]] = []
    for row in sorted({*range(rows), *products}):
        given = products.get(row, Product(row, (row,), (row,)))
        terms += [(row, term) for term in ((given,) if isinstance(given, Product) else given)]
    for row, term in terms:
        used = (row, term.query, *term.keys, *term.values)
        if not all(0 <= index < rows for index in used):
            raise ValueError(f"{term} for row {row} names a row outside the batch of {rows}")
    return ProductPlan(
        rows=rows,
        queries=tuple(sorted({term.query for _, term in terms})),
        keys=tuple(sorted({key for _, term in terms for key in term.keys})),
        values=tuple(sorted({value for _, term in terms for value in term.values})),
        # Maps over different numbers of keys do not fit one call.
        calls=tuple(
            _call([(row, term) for row, term in terms if len(term.keys) == length])
            for length in sorted({len(term.keys) for _, term in terms})
        ),
    )


def _call(terms: list[tuple[int, Product]]) -> AttentionCall:
    maps: dict[tuple[int, tuple[int, ...]], int] = {}
    for _, term in terms:
        maps.setdefault((term.query, term.keys), len(maps))
    return AttentionCall(
        maps=tuple(maps),
        products=tuple(term for _, term in terms),
        map_index=tuple(maps[term.query, term.keys] for _, term in terms),
        rows=tuple(row for row, _ in terms),
    )


def _is_one(weight: float | torch.Tensor) -> bool:
    return not isinstance(weight, torch.Tensor) and weight == 1.0
