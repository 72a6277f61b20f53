"""What a row of joint attention becomes: one softmax over image and text tokens, each taken from a row of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch

from .products import Product, are_alike

__all__ = ["AnyProduct", "JointPlan", "JointProduct", "MixedRows", "SegmentRows", "plan_joint_products"]

Part = Literal["query", "key", "value"]
Segment = Literal["image", "text"]
PARTS: tuple[Part, ...] = get_args(Part)
SEGMENTS: tuple[Segment, ...] = get_args(Segment)
# What the map of image queries is made of.
_MAP: tuple[tuple[Part, Segment], ...] = (("query", "image"), ("key", "image"), ("key", "text"))


@dataclass(frozen=True, eq=False)
class MixedRows:
    """Image tokens of two rows: ``share ⊙ kept + (1 - share) ⊙ other``.

    Args:
        kept, other: rows of the batch.
        share: of ``kept``, for each image token [N], from 0 to 1.
    """

    kept: int
    other: int
    share: torch.Tensor

    def __str__(self) -> str:
        return f"({self.kept} or {self.other} by mask)"


class SegmentRows(NamedTuple):
    """For each segment of a joint sequence, the row of the batch whose tokens stand there; None for zeros, which
    values alone may be."""

    image: int | MixedRows | None
    text: int | None


@dataclass(frozen=True)
class JointProduct:
    """One term of a row's output in joint attention, in rows of the batch::

        weight ⊙ softmax(scale · [q_I ; q_T] @ [k_I | k_T]ᵀ) @ [v_I ; v_T]

    where the image tokens (I) and the text tokens (T) of queries, keys and values each come from a row of their own.
    With a target t and its source s:

    ==========================================  ==============================================
    an unedited row ``b``                       ``JointProduct((b, b), (b, b), (b, b))``
    image queries and keys of the source        ``JointProduct((s, t), (s, t), (t, t))``
    the whole map of the source                 ``JointProduct((s, s), (s, s), (t, t))``
    image keys and values of the source         ``JointProduct((t, t), (s, t), (s, t))``
    what of the source's map falls on text      ``JointProduct((s, s), (s, s), (None, t))``
    ==========================================  ==============================================

    In a layer of image tokens alone the text's rows are not looked at.

    Args:
        query, key, value: (image row, text row). Image tokens may be those of two rows, as :class:`MixedRows`; values
            of a segment may be None, whose tokens then count in the softmax and give nothing.
        weight: a number, or a tensor with a weight for each image token [N]; text tokens, which have no place in the
            image, take its mean.
        mixing: a matrix applied to the text's values [T, T].
        outputs: the tokens whose output it is a term of: "all", or those of the "image" or of the "text" alone.
        reference: of a layer that attends to a reference picture as well (FLUX.1 Kontext), the row whose reference
            values it applies its map to: "text", that of its text values, or a row, or None for zeros. Queries and keys
            of the reference stand with the text's.
    """

    query: SegmentRows
    key: SegmentRows
    value: SegmentRows
    weight: float | torch.Tensor = 1.0
    mixing: torch.Tensor | None = None
    outputs: Literal["all", "image", "text"] = "all"
    reference: int | Literal["text"] | None = "text"

    def __eq__(self, other: object) -> bool:
        return are_alike(self, other) if isinstance(other, JointProduct) else NotImplemented

    def __post_init__(self) -> None:
        for name in ("query", "key", "value"):
            given = getattr(self, name)
            if not isinstance(given, SegmentRows):
                object.__setattr__(self, name, SegmentRows(*given))  # the way to do it in a frozen dataclass
        if None in (*map(_known, self.query), *map(_known, self.key)):
            raise ValueError(f"{self} has no queries or keys for a segment: None stands for values that give nothing")
        if self.outputs not in ("all", "image", "text"):
            raise ValueError(f'expected outputs to be "all", "image" or "text", got {self.outputs!r}')

    @classmethod
    def own(
        cls, row: int, weight: float | torch.Tensor = 1.0, outputs: Literal["all", "image", "text"] = "all"
    ) -> JointProduct:
        """What an unedited row is."""
        rows = SegmentRows(row, row)
        return cls(rows, rows, rows, weight, outputs=outputs)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is weighed."""
        return not isinstance(self.weight, torch.Tensor) and self.weight == 1.0

    def rows_of(self, part: Part, segment: Segment) -> tuple[int, ...]:
        """The rows whose tokens of a segment stand among its queries, keys or values."""
        rows = getattr(getattr(self, part), segment)
        if isinstance(rows, MixedRows):
            return rows.kept, rows.other
        beside = self.reference if part == "value" and segment == "text" and isinstance(self.reference, int) else None
        return tuple(row for row in dict.fromkeys((rows, beside)) if row is not None)

    @property
    def reference_row(self) -> int | None:
        """The row whose reference values it applies its map to."""
        return self.value.text if self.reference == "text" else self.reference

    def gives(self, *, references: bool) -> bool:
        """Whether it applies its map to anything, in a layer with tokens of a reference picture or without."""
        return self.value != (None, None) or (references and self.reference_row is not None)

    def concerns(self, segment: Segment) -> bool:
        """Whether it is a term of a segment's output."""
        return self.outputs in ("all", segment)

    def describe(self) -> str:
        """The product in a few words, as ``A(q 2|3, k 2|3) @ v 3``: image row | text row."""
        weight = "α ⊙ " if isinstance(self.weight, torch.Tensor) else "" if self.is_whole else f"{self.weight:.3g} "
        query, key = _spelled(self.query), _spelled(self.key)
        value = _spelled(self.value) if self.mixing is None else f"{_row(self.value.image)}|M {_row(self.value.text)}"
        where = "" if self.outputs == "all" else f" for {self.outputs}"
        return f"{weight}A(q {query}, k {key}) @ v {value}{where}"


def _spelled(rows: SegmentRows) -> str:
    """A row, or image row | text row."""
    return _row(rows.image) if rows.image == rows.text else f"{_row(rows.image)}|{_row(rows.text)}"


def _row(row: int | MixedRows | None) -> str:
    return "0s" if row is None else str(row)


def _known(row: int | MixedRows | None) -> bool | None:
    return None if row is None else True


#: What a term of any layer's row is.
AnyProduct = Product | JointProduct


@dataclass(frozen=True)
class JointPlan:
    """A joint layer's products: for each row of the batch its terms, in order of the rows.

    Args:
        rows: of the batch.
        terms: each with its row.
        observed: rows whose own image keys and values are looked at beside the terms.
        watched: rows after those of the batch, of which it is read how much their image looks at words.
    """

    rows: int
    terms: tuple[tuple[int, JointProduct], ...]
    observed: tuple[int, ...] = ()
    watched: tuple[int, ...] = ()

    @property
    def products(self) -> tuple[JointProduct, ...]:
        """The terms without the rows that they add up to."""
        return tuple(term for _, term in self.terms)

    @property
    def is_plain(self) -> bool:
        """Whether every row is one term, and no term is weighed."""
        whole = all(term.is_whole and term.outputs == "all" for _, term in self.terms)
        return whole and len(self.terms) == self.rows

    def terms_of(self, segment: Segment) -> tuple[tuple[int, JointProduct], ...]:
        """The terms of a segment's output."""
        return tuple((row, term) for row, term in self.terms if term.concerns(segment))

    def used(self, part: Part, segment: Segment) -> tuple[int, ...]:
        """The rows of the batch whose queries, keys or values of a segment are needed, in order."""
        return tuple(row for row in self._named(part, segment) if row < self.rows)

    @cached_property
    def reads(self) -> dict[int, frozenset[str]]:
        """What it needs of rows that are not in the batch: "image-query", "text-key" and so on."""
        parts: dict[int, set[str]] = {}
        for part in PARTS:
            for segment in SEGMENTS:
                for row in self._named(part, segment):
                    if row >= self.rows:
                        parts.setdefault(row, set()).add(f"{segment}-{part}")
        return {row: frozenset(names) for row, names in parts.items()}

    def _named(self, part: Part, segment: Segment) -> list[int]:
        terms = self.terms if part != "query" else self.terms_of(segment)
        beside = self.observed if part != "query" and segment == "image" else ()
        read = self.watched if (part, segment) in _MAP else ()
        return sorted({*beside, *read, *(row for _, term in terms for row in term.rows_of(part, segment))})

    @cached_property
    def description(self) -> str:
        """What rows become that do not keep their own map and values, in words."""
        said: dict[int, list[str]] = {}
        for row, term in self.terms:
            if term.describe() != JointProduct.own(row).describe():
                said.setdefault(row, []).append(term.describe())
        return "; ".join(f"row {row} = {' + '.join(terms)}" for row, terms in said.items()) or "as it was"


def plan_joint_products(
    products: Mapping[int, JointProduct | Sequence[JointProduct]],
    rows: int,
    recorded: int = 0,
    observed: tuple[int, ...] = (),
    watched: tuple[int, ...] = (),
) -> JointPlan:
    """Arrange an edit's products; rows that it does not name keep their own map and values.

    Args:
        products: by row.
        rows: of the batch.
        recorded: rows after those of the batch, which are known from a recording.
        observed: rows of the batch whose own image keys and values are looked at as well.
        watched: of the recorded rows, those of which it is read how much their image looks at words.

    Raises:
        TypeError: something else than a `JointProduct`.
        ValueError: a row outside the batch.
    """
    terms: list[tuple[int, JointProduct]] = []
    for row in sorted({*range(rows), *products}):
        given = products.get(row, JointProduct.own(row))
        for term in (given,) if not isinstance(given, Sequence) else given:
            if not isinstance(term, JointProduct):
                raise TypeError(
                    f"expected JointProducts for a layer in which image and text tokens attend together, the edit gave "
                    f"a {type(term).__name__} for row {row}: it is written for UNets, whose layers have one kind of "
                    "tokens"
                )
            if rows <= row < rows + recorded:
                raise ValueError(f"{term} would change row {row}, whose run is recorded and over: edit targets alone")
            named = [used for part in PARTS for segment in SEGMENTS for used in term.rows_of(part, segment)]
            if not all(0 <= used < rows + recorded for used in (row, *named)):
                raise ValueError(f"{term} for row {row} names a row outside the batch of {rows}")
            terms.append((row, term))
    plan = JointPlan(rows, tuple(terms), observed, watched)
    for segment in SEGMENTS:
        left_out = set(range(rows)) - {row for row, _ in plan.terms_of(segment)}
        if left_out:
            raise ValueError(
                f"the edit gave rows {sorted(left_out)} no term of their {segment} tokens: beside terms with outputs= "
                f'of the one segment, give some of the other, such as JointProduct.own(row, outputs="{segment}")'
            )
    return plan
