"""What a row of joint attention becomes: one softmax over image and text tokens, each taken from a row of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch

from .products import Product

__all__ = ["AnyProduct", "JointPlan", "JointProduct", "SegmentRows", "plan_joint_products"]

Part = Literal["query", "key", "value"]
Segment = Literal["image", "text"]
PARTS: tuple[Part, ...] = get_args(Part)
SEGMENTS: tuple[Segment, ...] = get_args(Segment)


class SegmentRows(NamedTuple):
    """For each segment of a joint sequence, the row of the batch whose tokens stand there."""

    image: int
    text: int


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
    ==========================================  ==============================================

    In a layer of image tokens alone the text's rows are not looked at.

    Args:
        query, key, value: (image row, text row).
        weight: a number, or a tensor with a weight for each image token [N]; text tokens, which have no place in the
            image, take its mean.
    """

    query: SegmentRows
    key: SegmentRows
    value: SegmentRows
    weight: float | torch.Tensor = 1.0

    def __post_init__(self) -> None:
        for name in ("query", "key", "value"):
            given = getattr(self, name)
            if not isinstance(given, SegmentRows):
                object.__setattr__(self, name, SegmentRows(*given))  # the way to do it in a frozen dataclass

    @classmethod
    def own(cls, row: int, weight: float | torch.Tensor = 1.0) -> JointProduct:
        """What an unedited row is."""
        rows = SegmentRows(row, row)
        return cls(rows, rows, rows, weight)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is weighed."""
        return not isinstance(self.weight, torch.Tensor) and self.weight == 1.0

    def describe(self) -> str:
        """The product in a few words, as ``A(q 2|3, k 2|3) @ v 3``: image row | text row."""
        weight = "α ⊙ " if isinstance(self.weight, torch.Tensor) else "" if self.is_whole else f"{self.weight:.3g} "
        query, key, value = (
            str(rows.image) if rows.image == rows.text else f"{rows.image}|{rows.text}"
            for rows in (self.query, self.key, self.value)
        )
        return f"{weight}A(q {query}, k {key}) @ v {value}"


#: What a term of any layer's row is.
AnyProduct = Product | JointProduct


@dataclass(frozen=True)
class JointPlan:
    """A joint layer's products: for each row of the batch its terms, in order of the rows."""

    rows: int
    terms: tuple[tuple[int, JointProduct], ...]

    @property
    def products(self) -> tuple[JointProduct, ...]:
        """The terms without the rows that they add up to."""
        return tuple(term for _, term in self.terms)

    @property
    def is_plain(self) -> bool:
        """Whether every row is one term, and no term is weighed."""
        return len(self.terms) == self.rows and all(term.is_whole for _, term in self.terms)

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
        return sorted({getattr(getattr(term, part), segment) for _, term in self.terms})

    @cached_property
    def description(self) -> str:
        """What rows become that do not keep their own map and values, in words."""
        said: dict[int, list[str]] = {}
        for row, term in self.terms:
            if term.describe() != JointProduct.own(row).describe():
                said.setdefault(row, []).append(term.describe())
        return "; ".join(f"row {row} = {' + '.join(terms)}" for row, terms in said.items()) or "as it was"


def plan_joint_products(
    products: Mapping[int, JointProduct | Sequence[JointProduct]], rows: int, recorded: int = 0
) -> JointPlan:
    """Arrange an edit's products; rows that it does not name keep their own map and values.

    Args:
        products: by row.
        rows: of the batch.
        recorded: rows after those of the batch, which are known from a recording.

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
            if not all(0 <= used < rows + recorded for used in (row, *term.query, *term.key, *term.value)):
                raise ValueError(f"{term} for row {row} names a row outside the batch of {rows}")
            terms.append((row, term))
    return JointPlan(rows, tuple(terms))
