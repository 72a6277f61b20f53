"""A plan of joint products in terms of ``fpe_kernels``: what rows share of the image is computed once for all of them.

The image's queries attend to image keys and to text keys under one softmax. As maps over disjoint keys, joined, the
image part is one map for a source and all of its targets, and only the text part, which is small, is private to a row::

    image rows:  join([A(q_I, k_I), A(q_I, k_T)]) @ [v_I ; v_T]
    text rows:   A(q_T, [k_I | k_T]) @ [v_I ; v_T]

Edited rows and unedited ones go the same way, so that a source's row does not depend on what is made of it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fpe_kernels import AttentionMap, LinearMap, join

from ..edits.joint_products import JointPlan, JointProduct
from .computing import Rows
from .known_rows import RecordedLayer

__all__ = ["JointLayer", "SegmentProjections", "evaluate_joint", "text_maps"]


class SegmentProjections(NamedTuple):
    """Queries, keys and values of one segment: at least the rows that a plan uses, as [rows, H, tokens, D | E]."""

    query: Rows
    key: Rows
    value: Rows

    def beside(self, segment: str, recorded: RecordedLayer | None) -> SegmentProjections:
        """The same, and the rows beside the batch that a recording knows."""
        if recorded is None:
            return self
        known = recorded.unpacked(self.value.tensor.dtype)
        parts = zip(("query", "key", "value"), self, strict=True)
        return SegmentProjections(
            *(Rows(rows.tensor, rows.rows, known.get(f"{segment}-{part}", {})) for part, rows in parts)
        )


@dataclass(frozen=True)
class JointLayer:
    """A layer's projected rows, and what its scores are made with.

    Args:
        image: of the image's tokens.
        text: of the text's tokens; None in a layer that has none.
        scale: what scores are multiplied with.
        backend: of the maps.
    """

    image: SegmentProjections
    text: SegmentProjections | None
    scale: float
    backend: str = "auto"

    def map(self, query: torch.Tensor, key: torch.Tensor) -> AttentionMap:
        """The maps of some queries [G, H, N, D] and keys [G, H, M, D]."""
        return AttentionMap(query, key, scale=self.scale, backend=self.backend)

    def values(self, terms: Sequence[JointProduct]) -> torch.Tensor:
        """The values of each term, those of the image first: [terms, H, M, E]."""
        image = self.image.value.take([term.value.image for term in terms])
        if self.text is None:
            return image
        return torch.cat([image, self.text.value.take([term.value.text for term in terms])], dim=2)

    def keys(self, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """For each (image row, text row), the keys of both segments: [pairs, H, M, D]."""
        assert self.text is not None
        image, text = self.image.key.take([row for row, _ in pairs]), self.text.key.take([row for _, row in pairs])
        return torch.cat([image, text], dim=2)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of what the products are made from, and of a number of them."""
        segments = [self.image] if self.text is None else [self.image, self.text]
        tensors = [rows.tensor for segment in segments for rows in segment]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors), tensors[0].element_size()


def evaluate_joint(plan: JointPlan, layer: JointLayer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The plan's products, summed by row.

    Returns:
        Image rows [plan.rows, H, N, E] and text rows [plan.rows, H, T, E]; None where there is no text.
    """
    terms = plan.products
    values = layer.values(terms)
    image = _summed(plan, _image_rows(terms, layer, values), is_text=False)
    return image, None if layer.text is None else _summed(plan, _text_rows(terms, layer, values), is_text=True)


def text_maps(plan: JointPlan, rows: Sequence[int], layer: JointLayer) -> dict[int, LinearMap]:
    """How the image of some rows attends to the text: the text's columns of the one softmax over both.

    They are the softmax over the text's keys alone, times the share of each image token's attention that the text has,
    which is a product of the whole map with the text's indicator. Detached.

    Returns:
        By row [H, 1, N, T], a head a row.
    """
    assert layer.text is not None
    terms = plan.products
    values = layer.values(terms)[..., :1]
    texts = layer.text.key.tensor.shape[2]
    indicator = torch.zeros_like(values)
    indicator[:, :, -texts:] = 1.0
    shares = _image_rows(terms, layer, indicator).detach()[..., 0]  # [terms, H, N]
    summands: dict[int, list[LinearMap]] = {row: [] for row in rows}
    for (row, term), share in zip(plan.terms, shares, strict=True):
        if row in summands:
            query = layer.image.query.take([term.query.image])[0].detach()
            key = layer.text.key.take([term.key.text])[0].detach()
            alone = layer.map(query.unsqueeze(1), key.unsqueeze(1)).scale_rows(share.unsqueeze(1))
            if not term.is_whole:
                weight = _weight(term.weight, share.unsqueeze(-1), share.dtype, is_text=False)
                alone = alone.scale_rows(weight if isinstance(weight, float) else weight[None, None, :, 0])
            summands[row].append(alone)
    return {row: functools.reduce(operator.add, parts) for row, parts in summands.items()}


def _image_rows(terms: Sequence[JointProduct], layer: JointLayer, values: torch.Tensor) -> torch.Tensor:
    pairs, index = _distinct([(term.query.image, term.key.image) for term in terms])
    queries, keys = layer.image.query, layer.image.key
    whole = layer.map(queries.take([query for query, _ in pairs]), keys.take([key for _, key in pairs])).take(index)
    if layer.text is not None:
        pairs, index = _distinct([(term.query.image, term.key.text) for term in terms])
        keys = layer.text.key
        text = layer.map(queries.take([query for query, _ in pairs]), keys.take([key for _, key in pairs])).take(index)
        whole = join([whole, text])
    return whole @ values


def _text_rows(terms: Sequence[JointProduct], layer: JointLayer, values: torch.Tensor) -> torch.Tensor:
    assert layer.text is not None
    triples, index = _distinct([(term.query.text, *term.key) for term in terms])
    queries = layer.text.query.take([query for query, _, _ in triples])
    return layer.map(queries, layer.keys([(image, text) for _, image, text in triples])).take(index) @ values


def _distinct(named: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """What there is, each once, and for each entry which of those it is."""
    places: dict[Hashable, int] = {}
    index = [places.setdefault(entry, len(places)) for entry in named]
    return list(dict.fromkeys(named)), index


def _summed(plan: JointPlan, products: torch.Tensor, *, is_text: bool) -> torch.Tensor:
    """Terms [terms, H, N, E], weighed and added up by row."""
    if plan.is_plain:
        return products
    wide = torch.promote_types(products.dtype, torch.float32)
    sums: list[torch.Tensor | None] = [None] * plan.rows
    for (row, term), product in zip(plan.terms, products, strict=True):
        weighed = product.to(wide) * _weight(term.weight, product, wide, is_text=is_text)
        before = sums[row]
        sums[row] = weighed if before is None else before + weighed
    return torch.stack([total for total in sums if total is not None]).to(products.dtype)


def _weight(
    weight: float | torch.Tensor, product: torch.Tensor, dtype: torch.dtype, *, is_text: bool
) -> float | torch.Tensor:
    """A number, or [N, 1] beside products [H, N, E]."""
    if not isinstance(weight, torch.Tensor):
        return weight
    placed = weight.to(product.device, dtype)
    return placed.mean() if is_text else placed.expand(product.shape[1])[:, None]
