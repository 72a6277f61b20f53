"""What a row of a replaced layer becomes: a sum of attention maps times values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["AttentionCall", "MapSpec", "Product", "ProductPlan", "plan_products"]


@dataclass(frozen=True)
class MapSpec:
    """One attention map, in rows of the batch; products with equal specifications share it.

    Args:
        query: the row that asks.
        keys: the rows whose keys it has, one row's tokens after the other's.
        style: the row whose mean and deviation over tokens the queries and keys of the others are given, or None.
        shifts: what is added to the scores of each of ``keys``' tokens; () for nothing.
    """

    query: int
    keys: tuple[int, ...]
    style: int | None = None
    shifts: tuple[float, ...] = ()

    @property
    def query_rows(self) -> tuple[int, ...]:
        """Rows whose queries it needs."""
        return (self.query,) if self.style is None else (self.query, self.style)

    @property
    def key_rows(self) -> tuple[int, ...]:
        """Rows whose keys it needs."""
        return self.keys if self.style is None else (*self.keys, self.style)


@dataclass(frozen=True)
class Product:
    """One term of a row's output, in rows of the batch::

        weight ⊙ softmax(scale · q[query] @ k[keys]ᵀ) @ (mixing @ v[values])

    where ``k[keys]`` and ``v[values]`` stand for the rows' tokens, one row's after the other's. Queries and keys may
    be given the statistics of another row, and scores a shift, before the softmax.

    ====================================  =================================================================
    an unedited row ``b``                 ``Product(b, (b,), (b,))``
    Free-Prompt-Editing, Plug-and-Play    ``Product(source, (source,), (target,))``
    MasaCtrl                              ``Product(target, (source,), (source,))``
    StyleAligned                          ``Product(b, (source, b), (source, b), style=source, shifts=(s, 0.0))``
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
        style: a row whose mean and deviation over tokens (a head and channel) the other rows' queries and keys take
            (adaptive instance normalisation).
        shifts: for each of ``keys``, what is added to the scores of its tokens; empty for nothing.
    """

    query: int
    keys: tuple[int, ...]
    values: tuple[int, ...]
    weight: float | torch.Tensor = 1.0
    mixing: torch.Tensor | None = None
    style: int | None = None
    shifts: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.shifts and len(self.shifts) != len(self.keys):
            raise ValueError(f"expected a shift for each of the keys {self.keys}, got {self.shifts}")
        if self.mixing is None and len(self.keys) != len(self.values):
            raise ValueError(f"a map over {self.keys} cannot be applied to the values of {self.values} without mixing")

    @property
    def map(self) -> MapSpec:
        """The map that is multiplied with."""
        return MapSpec(self.query, self.keys, self.style, self.shifts)

    def describe(self) -> str:
        """The product in a few words, as ``A(q 2, k 2) @ v 3``."""
        weight = "α ⊙ " if isinstance(self.weight, torch.Tensor) else "" if self.weight == 1 else f"{self.weight:.3g} "
        keys, values = (" ‖ ".join(map(str, rows)) for rows in (self.keys, self.values))
        like = "" if self.style is None else f" like {self.style}"
        return f"{weight}A(q {self.query}{like}, k {keys}) @ {'' if self.mixing is None else 'M '}v {values}"


@dataclass(frozen=True)
class AttentionCall:
    """One call of ``shared_attention``: the distinct maps, and the products that use them."""

    maps: tuple[MapSpec, ...]
    products: tuple[Product, ...]
    map_index: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class ProductPlan:
    """A layer's products, arranged for computing: which rows to project, and which calls to make."""

    rows: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    values: tuple[int, ...]
    calls: tuple[AttentionCall, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the output of the one call is the layer's: a product a row, in order."""
        return len(self.calls) == 1 and self.calls[0].rows == tuple(range(self.rows))

    def describe(self) -> str:
        """What rows become that do not keep their own map and values, in words."""
        said: dict[int, list[str]] = {}
        for call in self.calls:
            for row, product in zip(call.rows, call.products, strict=True):
                what = product.describe()
                if what != Product(row, (row,), (row,)).describe():
                    said.setdefault(row, []).append(what)
        return "; ".join(f"row {row} = {' + '.join(terms)}" for row, terms in sorted(said.items())) or "as it was"


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
        used = (row, *term.map.query_rows, *term.map.key_rows, *term.values)
        if not all(0 <= index < rows for index in used):
            raise ValueError(f"{term} for row {row} names a row outside the batch of {rows}")
    return ProductPlan(
        rows=rows,
        queries=tuple(sorted({query for _, term in terms for query in term.map.query_rows})),
        keys=tuple(sorted({key for _, term in terms for key in term.map.key_rows})),
        values=tuple(sorted({value for _, term in terms for value in term.values})),
        # Maps over different numbers of keys do not fit one call.
        calls=tuple(
            _call([(row, term) for row, term in terms if len(term.keys) == length])
            for length in sorted({len(term.keys) for _, term in terms})
        ),
    )


def _call(terms: list[tuple[int, Product]]) -> AttentionCall:
    maps: dict[MapSpec, int] = {}
    for _, term in terms:
        maps.setdefault(term.map, len(maps))
    return AttentionCall(
        maps=tuple(maps),
        products=tuple(term for _, term in terms),
        map_index=tuple(maps[term.map] for _, term in terms),
        rows=tuple(row for row, _ in terms),
    )
