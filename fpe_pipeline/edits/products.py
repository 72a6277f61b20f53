"""What a row of a replaced layer becomes: a sum of attention maps times values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from numbers import Real
from typing import Any

import torch

__all__ = ["AttentionCall", "MapSpec", "Product", "ProductPlan", "are_alike", "plan_products"]


def are_alike(one: Any, other: Any) -> bool:
    """Whether two instances of a dataclass have the same fields, and the very same tensors.

    What a tensor's ``==`` gives is no answer; from Python 3.13 on dataclasses ask for it even of a tensor and itself.
    """
    for name in (field.name for field in fields(one)):
        pair = getattr(one, name), getattr(other, name)
        if pair[0] is not pair[1] and (any(isinstance(each, torch.Tensor) for each in pair) or pair[0] != pair[1]):
            return False
    return True


@dataclass(frozen=True)
class MapSpec:
    """One attention map, in rows of the batch; products with equal specifications share it.

    Args:
        query: the row that asks.
        keys: the rows whose keys it has, one row's tokens after the other's.
        style: the row whose mean and deviation over tokens the queries and keys of the others are given, or None.
        shifts: what is added to the scores of each of ``keys``' tokens; () for nothing.
        scale: factor of the scores, beside the layer's own.
        styled: which of "query" and "key" are given those statistics.
        scales: what each of ``keys``' keys are multiplied with; () for nothing.
    """

    query: int
    keys: tuple[int, ...]
    style: int | None = None
    shifts: tuple[float, ...] = ()
    scale: float = 1.0
    styled: tuple[str, ...] = ("query", "key")
    scales: tuple[float, ...] = ()

    @property
    def is_own(self) -> bool:
        """Whether it is the map that its row has without any edit."""
        changed = (
            self.style is not None or any(self.shifts) or any(scale != 1.0 for scale in (self.scale, *self.scales))
        )
        return self.keys == (self.query,) and not changed

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

        weight ⊙ softmax(scale · layer.scale · q[query] @ k[keys]ᵀ + shifts) @ (mixing @ v[values])

    where ``k[keys]`` and ``v[values]`` stand for the rows' tokens, one row's after the other's. Queries and keys may
    be given the statistics of another row before.

    ====================================  =================================================================
    an unedited row ``b``                 ``Product(b, (b,), (b,))``
    Free-Prompt-Editing, Plug-and-Play    ``Product(source, (source,), (target,))``
    MasaCtrl                              ``Product(target, (source,), (source,))``
    StyleAligned                          ``Product(b, (source, b), (source, b), style=source, shifts=(s, 0.0))``
    soft or regional Free-Prompt-Editing  ``Product(source, (source,), (target,), weight=a)`` and
                                          ``Product(target, (target,), (target,), weight=1 - a)``
    Prompt-to-Prompt                      ``Product(source, (source,), (target,), mixing=M @ diag(a))`` and
                                          ``Product(target, (target,), (target,), mixing=diag(1 - a))``
    a sharper map (a > 1) in some heads   ``Product(b, (b,), (b,), weight=h, scale=a)`` and
                                          ``Product(b, (b,), (b,), weight=1 - h)``, h of shape [H, 1]
    ====================================  =================================================================

    Args:
        query: the row that asks.
        keys: the rows whose keys make the map, as a tuple, a list or one row.
        values: the rows whose values the map is applied to; the same.
        weight: a number, or a tensor with a weight for each query token [N], each head [H, 1] or each of both [H, N].
        mixing: a matrix applied to the values' tokens [M, M'], or one for each head [H, M, M'].
        style: a row whose mean and deviation over tokens (a head and channel) the other rows' queries and keys take
            (adaptive instance normalisation).
        shifts: for each of ``keys``, what is added to the scores of its tokens; empty for nothing.
        scale: factor of the scores beside the layer's own: larger ones sharpen the map, smaller ones level it.
        styled: which of "query", "key" and "value" take the statistics of ``style``.
        scales: for each of ``keys``, what its keys are multiplied with; empty for nothing.

    Raises:
        TypeError: rows that are no whole numbers.
        ValueError: numbers of keys, values, shifts and scales that do not fit one another; a scale that is not finite.
    """

    query: int
    keys: tuple[int, ...]
    values: tuple[int, ...]
    weight: float | torch.Tensor = 1.0
    mixing: torch.Tensor | None = None
    style: int | None = None
    shifts: tuple[float, ...] = ()
    scale: float = 1.0
    styled: tuple[str, ...] = ("query", "key")
    scales: tuple[float, ...] = ()

    def __eq__(self, other: object) -> bool:
        return are_alike(self, other) if isinstance(other, Product) else NotImplemented

    def __post_init__(self) -> None:
        # Plans are looked up by products, so that lists, which have no hash, become tuples.
        object.__setattr__(self, "keys", _rows("keys", self.keys))
        object.__setattr__(self, "values", _rows("values", self.values))
        for name in ("shifts", "scales", "styled"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.scale, bool) or not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            raise ValueError(f"expected a finite number as scale of the scores, got {self.scale!r}")
        for name, given in (("shift", self.shifts), ("scale", self.scales)):
            if given and len(given) != len(self.keys):
                raise ValueError(f"expected a {name} for each of the keys {self.keys}, got {given}")
        if not set(self.styled) <= {"query", "key", "value"}:
            raise ValueError(f'expected styled to name "query", "key" and "value", got {self.styled}')
        if self.mixing is None and len(self.keys) != len(self.values):
            raise ValueError(f"a map over {self.keys} cannot be applied to the values of {self.values} without mixing")

    @property
    def map(self) -> MapSpec:
        """The map that is multiplied with."""
        if self.style is None:
            return MapSpec(self.query, self.keys, None, self.shifts, self.scale, scales=self.scales)
        styled = tuple(part for part in ("query", "key") if part in self.styled)
        style = self.style if styled else None
        return MapSpec(self.query, self.keys, style, self.shifts, self.scale, styled, self.scales)

    @property
    def value_style(self) -> int | None:
        """The row whose statistics its values take, or None."""
        return self.style if "value" in self.styled else None

    @property
    def value_rows(self) -> tuple[int, ...]:
        """Rows whose values it needs."""
        return self.values if self.value_style is None else (*self.values, self.value_style)

    def describe(self) -> str:
        """The product in a few words, as ``A(q 2, k 2) @ v 3``."""
        weight = "α ⊙ " if isinstance(self.weight, torch.Tensor) else "" if self.weight == 1 else f"{self.weight:.3g} "
        keys, values = (" ‖ ".join(map(str, rows)) for rows in (self.keys, self.values))
        like = "" if self.map.style is None else f" like {self.style}"
        sharper = "" if self.scale == 1 else f"{self.scale:.3g} · "
        return f"{weight}A({sharper}q {self.query}{like}, k {keys}) @ {'' if self.mixing is None else 'M '}v {values}"


def _rows(name: str, rows: Any) -> tuple[int, ...]:
    """One row or several, as a tuple."""
    several = (rows,) if isinstance(rows, int) else tuple(rows) if isinstance(rows, Sequence) else None
    if several is None or not all(isinstance(row, int) and not isinstance(row, bool) for row in several):
        raise TypeError(f"expected rows of the batch as {name}, such as (0, 1), got {rows!r}")
    return several


@dataclass(frozen=True)
class AttentionCall:
    """One call of ``shared_attention``: the distinct maps, of one scale, and the products that use them.

    ``recorded`` says that all of them are known from a recording and are computed with their log-sum-exp.
    """

    maps: tuple[MapSpec, ...]
    products: tuple[Product, ...]
    map_index: tuple[int, ...]
    rows: tuple[int, ...]
    recorded: bool = False


@dataclass(frozen=True)
class ProductPlan:
    """A layer's products, arranged for computing: which rows to project, and which calls to make.

    Rows from ``rows`` on are not in the batch: a recording knows them, and they are neither projected nor computed.
    """

    rows: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    values: tuple[int, ...]
    calls: tuple[AttentionCall, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the calls' outputs, put in order, are the layer's: a product a row."""
        return sum(len(call.rows) for call in self.calls) == self.rows

    @cached_property
    def only_call(self) -> AttentionCall | None:
        """The call that is the whole plan, where that is softmax attention of single rows and nothing beside."""
        if len(self.calls) != 1 or self.calls[0].recorded:
            return None
        (call,) = self.calls
        plain = all(
            not isinstance(product.weight, torch.Tensor)
            and product.weight == 1.0
            and product.mixing is None
            and product.style is None
            and product.scale == 1.0
            and not any((*product.shifts, *product.scales))
            and len(product.keys) == 1
            and max(product.query, *product.keys, *product.values) < self.rows
            for product in call.products
        )
        return call if plain and call.rows == tuple(range(self.rows)) else None

    @cached_property
    def reads(self) -> dict[int, frozenset[str]]:
        """What it needs of rows that are not in the batch: "query", "key", "value" and, of a map, "logsumexp"."""
        parts: dict[int, set[str]] = {}
        for call in self.calls:
            named = [(spec.is_own, "logsumexp", spec.query_rows) for spec in call.maps]
            named += [(True, "query", spec.query_rows) for spec in call.maps]
            named += [(True, "key", spec.key_rows) for spec in call.maps]
            named += [(True, "value", product.value_rows) for product in call.products]
            for needed, part, rows in named:
                for row in rows:
                    if needed and row >= self.rows:
                        parts.setdefault(row, set()).add(part)
        return {row: frozenset(names) for row, names in parts.items()}

    @cached_property
    def description(self) -> str:
        """What rows become that do not keep their own map and values, in words."""
        said: dict[int, list[str]] = {}
        for call in self.calls:
            for row, product in zip(call.rows, call.products, strict=True):
                what = product.describe()
                if what != Product(row, (row,), (row,)).describe():
                    said.setdefault(row, []).append(what)
        return "; ".join(f"row {row} = {' + '.join(terms)}" for row, terms in sorted(said.items())) or "as it was"


def plan_products(products: Mapping[int, Product | Sequence[Product]], rows: int, recorded: int = 0) -> ProductPlan:
    """Arrange an edit's products; rows that it does not name keep their own map and values.

    Args:
        products: by row.
        rows: of the batch.
        recorded: how many rows, numbered from ``rows`` on, are known from a recording.

    Raises:
        ValueError: a row outside the batch, or products for one that is recorded.
    """
    terms: list[tuple[int, Product]] = []
    for row in sorted({*range(rows), *products}):
        given = products.get(row, Product(row, (row,), (row,)))
        terms += [(row, term) for term in ((given,) if isinstance(given, Product) else given)]
    # Layers and steps mostly ask for the same products. Those with tensors are not kept, nor are the tensors.
    plain = not any(isinstance(term.weight, torch.Tensor) or term.mixing is not None for _, term in terms)
    return (_known_plan if plain else _plan)(tuple(terms), rows, recorded)


def _plan(terms: Sequence[tuple[int, Product]], rows: int, recorded: int) -> ProductPlan:
    for row, term in terms:
        used = (row, *term.map.query_rows, *term.map.key_rows, *term.value_rows)
        if rows <= row < rows + recorded:
            raise ValueError(f"{term} would change row {row}, whose run is recorded and over: edit targets alone")
        if not all(0 <= index < rows + recorded for index in used):
            raise ValueError(f"{term} for row {row} names a row outside the batch of {rows}")
    return ProductPlan(
        rows=rows,
        queries=_in_batch(rows, (query for _, term in terms for query in term.map.query_rows)),
        keys=_in_batch(rows, (key for _, term in terms for key in term.map.key_rows)),
        values=_in_batch(rows, (value for _, term in terms for value in term.value_rows)),
        calls=_calls(terms, rows),
    )


_known_plan = lru_cache(maxsize=256)(_plan)


def _in_batch(rows: int, named: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({row for row in named if row < rows}))


def _calls(terms: Sequence[tuple[int, Product]], rows: int) -> tuple[AttentionCall, ...]:
    """Maps over different numbers of keys or of different scales do not fit one call, nor do those whose log-sum-exp
    is known and others.

    A known log-sum-exp saves less than a call costs where a map serves a single product: that one joins the others.
    """
    uses = Counter(term.map for _, term in terms)
    groups: dict[tuple[int, bool, float], list[tuple[int, Product]]] = {}
    for row, term in terms:
        recorded = term.query >= rows and term.map.is_own and uses[term.map] > 1
        groups.setdefault((len(term.keys), recorded, term.scale), []).append((row, term))
    return tuple(_call(group, recorded) for (_, recorded, _), group in sorted(groups.items(), key=lambda item: item[0]))


def _call(terms: list[tuple[int, Product]], recorded: bool) -> AttentionCall:
    maps: dict[MapSpec, int] = {}
    for _, term in terms:
        maps.setdefault(term.map, len(maps))
    return AttentionCall(
        maps=tuple(maps),
        products=tuple(term for _, term in terms),
        map_index=tuple(maps[term.map] for _, term in terms),
        rows=tuple(row for row, _ in terms),
        recorded=recorded,
    )
