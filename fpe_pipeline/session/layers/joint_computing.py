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
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional

from fpe_kernels import AttentionMap, LinearMap, join

from ...edits.joint_products import JointPlan, JointProduct, MixedRows
from .computing import Rows, take
from .known_rows import RecordedLayer
from .places import turned
from .segment_rows import as_long, column_values, mixed, tokens_of, values_of

__all__ = ["JointLayer", "JointOutput", "SegmentProjections", "evaluate_joint", "text_maps"]


class SegmentProjections(NamedTuple):
    """Queries, keys and values of one segment: at least the rows that a plan uses, as [rows, H, tokens, D | E]."""

    query: Rows
    key: Rows
    value: Rows

    def followed_by(self, other: SegmentProjections) -> SegmentProjections:
        """These tokens and then others, of the same rows."""
        return SegmentProjections(
            *(Rows(torch.cat([a.tensor, b.tensor], dim=2), a.rows) for a, b in zip(self, other, strict=True))
        )

    def beside(self, segment: str, recorded: RecordedLayer | None, *, ends: bool = False) -> SegmentProjections:
        """The same, and the rows beside the batch that a recording knows.

        Args:
            segment: "image" or "text".
            recorded: of the layer; None for no rows.
            ends: whether texts end where they end: those of a recording become as long as the batch's, by padding or
                without some of it.
        """
        if recorded is None:
            return self
        known = recorded.unpacked(self.value.tensor.dtype)
        parts = zip(("query", "key", "value"), self, strict=True)
        return SegmentProjections(
            *(
                Rows(
                    rows.tensor,
                    rows.rows,
                    {
                        row: as_long(tokens, rows.tensor.shape[2]) if ends else tokens
                        for row, tokens in known.get(f"{segment}-{part}", {}).items()
                    },
                )
                for part, rows in parts
            )
        )


@dataclass(frozen=True)
class JointLayer:
    """A layer's projected rows, and what its scores are made with.

    Args:
        image: of the image's tokens.
        text: of the text's tokens; None in a layer that has none.
        scale: what scores are multiplied with.
        backend: of the maps.
        text_lengths: for each row of the batch, and after them each recorded one, its text tokens before padding; None
            where none is padding.
        references: how many of the text's tokens are each row's own beside its image and its text: those of a reference
            picture, or padding of the image that is attended to.
        references_first: whether they stand before the text and not behind it, where the padding of texts may follow.
        origins: where rotary embeddings follow the text's length, for each row of the batch, and after them each
            recorded one, what its image's tokens are turned by in common, as complex numbers [rows, D / 2].
        stands: of recorded rows, which of the origins image tokens have that stand in such a row's place, beside its
            text: its own are kept at another.
        text_asks: whether text tokens look at anything here; where they do not, what they become is not computed.
        seen: [rows, T], of the same rows one for each text token and zero for padding, where padding takes some
            attention: from queries that are no padding e times less than scores give it. None where there is no such
            padding.
    """

    image: SegmentProjections
    text: SegmentProjections | None
    scale: float
    backend: str = "auto"
    text_lengths: tuple[int, ...] | None = None
    references: int = 0
    origins: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    references_first: bool = False
    stands: Mapping[int, int] = field(default_factory=dict)
    text_asks: bool = True

    @property
    def text_tokens(self) -> tuple[int, int]:
        """Where the text itself begins and ends among the text's tokens."""
        assert self.text is not None
        tokens = self.text.key.tensor.shape[2]
        return (self.references, tokens) if self.references_first else (0, tokens - self.references)

    def map(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        lengths: list[int] | None = None,
        bias: torch.Tensor | None = None,
    ) -> AttentionMap:
        """The maps of some queries [G, H, N, D] and keys [G, H, M, D], of which so many are no padding."""
        return AttentionMap(query, key, scale=self.scale, bias=bias, backend=self.backend, key_lengths=lengths)

    def map_over_texts(
        self, query: torch.Tensor, key: torch.Tensor, texts: Sequence[int], asking: Sequence[int] | None = None
    ) -> AttentionMap:
        """The maps of some queries [G, H, N, D] and keys [G, H, M, D], which are or end with the texts of rows.

        Args:
            texts: G rows, whose padding gets what is its due.
            asking: G rows whose texts the queries are; None for queries of images.
        """
        if self.text_lengths is None and self.seen is None:
            return self.map(query, key)
        assert not self.references or self.references_first, "padding stands between texts and references"
        start, stop = self.text_tokens
        before = key.shape[2] - (stop - start)
        lengths = None if self.text_lengths is None else [before + self.text_lengths[row] for row in texts]
        if self.seen is None:
            return self.map(query, key, lengths)
        seen = self.seen.to(query.dtype)
        bias = functional.pad(take(seen, texts) - 1, (before, 0))[:, None, None]
        if asking is not None:  # queries that are padding themselves tell no keys apart
            assert not self.references, "queries of references are of no text"
            bias = bias * take(seen, asking)[:, None, :, None]
        return self.map(query, key, lengths, bias)

    def images(self, rows: Rows, named: Sequence[tuple[Any, Any]]) -> torch.Tensor:
        """Queries or keys of image tokens, for each (row, row in whose place they are to stand): [entries, H, N, D].

        Tokens of two rows, mixed, stand in the place of the first unless another is named.
        """
        if self.origins is None or not any(isinstance(row, MixedRows) for row, _ in named):
            return self._moved(rows, named)
        return torch.cat([self._mixed(rows, *entry) for entry in named])

    def _mixed(self, rows: Rows, row: Any, place: Any) -> torch.Tensor:
        if not isinstance(row, MixedRows):
            return self._moved(rows, [(row, place)])
        kept, other = (self._moved(rows, [(each, place)]) for each in (row.kept, row.other))
        return mixed(kept, other, row.share)

    def _moved(self, rows: Rows, named: Sequence[tuple[Any, Any]]) -> torch.Tensor:
        tokens = tokens_of(rows, [row for row, _ in named])
        places = [place.kept if isinstance(place, MixedRows) else place for _, place in named]
        places = [self.stands.get(place, place) for place in places]
        if self.origins is None or all(row == place for (row, _), place in zip(named, places, strict=True)):
            return tokens
        return self._turned(tokens, self.origins[[row for row, _ in named]].conj() * self.origins[places])

    def unplaced(self, rows: Rows, row: int) -> torch.Tensor:
        """Queries or keys of a row's image tokens as they would stand without a text before them: [1, H, N, D]."""
        tokens = tokens_of(rows, [row])
        return tokens if self.origins is None else self._turned(tokens, self.origins[[row]].conj())

    def placed(self, tokens: torch.Tensor, row: int) -> torch.Tensor:
        """The inverse of :meth:`unplaced`."""
        return tokens if self.origins is None else self._turned(tokens, self.origins[[row]])

    def _turned(self, tokens: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Tokens [entries, H, N, D], each entry turned by complex numbers [entries, D / 2]."""
        angles = by[:, None, None].to(torch.promote_types(tokens.dtype, torch.float32).to_complex())
        return turned(tokens, angles.real, angles.imag)

    def values(self, terms: Sequence[JointProduct]) -> torch.Tensor:
        """The values of each term, those of the image first: [terms, H, M, E]."""
        image = values_of(self.image.value, [term.value.image for term in terms])
        if self.text is None:
            return image
        texts = [term.value.text for term in terms]
        mixings = [term.mixing for term in terms]
        if not self.references:
            return torch.cat([image, values_of(self.text.value, texts, mixings)], dim=2)
        given, (start, stop) = self.text.value, self.text_tokens
        beside = slice(start) if self.references_first else slice(stop, None)
        text, picture = (given.within(where) for where in (slice(start, stop), beside))
        read, seen = values_of(text, texts, mixings), values_of(picture, [term.reference_row for term in terms])
        return torch.cat([image, seen, read] if self.references_first else [image, read, seen], dim=2)

    def keys(self, pairs: Sequence[tuple[Any, Any]]) -> torch.Tensor:
        """For each (image row, text row), the keys of both segments: [pairs, H, M, D]."""
        assert self.text is not None
        image = self.images(self.image.key, pairs)
        return torch.cat([image, tokens_of(self.text.key, [row for _, row in pairs])], dim=2)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of what the products are made from, and of a number of them."""
        segments = [self.image] if self.text is None else [self.image, self.text]
        tensors = [rows.tensor for segment in segments for rows in segment]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors), tensors[0].element_size()


class JointOutput(NamedTuple):
    """What a layer's rows become.

    Args:
        image: [rows, H, N, E].
        text: [rows, H, T, E]; None where there is no text, or none that asks.
        heat: for each row of the columns that were asked, the edited map of its image queries over text keys, times
            them: [H, N, C].
    """

    image: torch.Tensor
    text: torch.Tensor | None
    heat: dict[int, torch.Tensor]


def evaluate_joint(
    plan: JointPlan, layer: JointLayer, columns: Mapping[int, torch.Tensor] | None = None
) -> JointOutput:
    """The plan's products, summed by row, and beside them products of the rows' edited maps with columns.

    A row's output is linear in its values, so the columns are carried through the same products as more values of its
    text tokens: scores and softmax are computed once for both.

    Args:
        columns: for some rows, what the edited map of their image queries is to be multiplied with [T, C].
    """
    columns, dim = columns or {}, layer.image.value.tensor.shape[-1]
    products = _image_rows(plan, layer, columns)
    of_batch = len(products) - len(plan.watched)
    wide = _summed(plan, "image", products[:of_batch])
    read = dict(enumerate(wide)) | dict(zip(plan.watched, products[of_batch:], strict=True))
    heat = {row: read[row][..., dim : dim + given.shape[-1]] for row, given in columns.items()}
    image = wide[..., :dim] if heat else wide
    if layer.text is None or not layer.text_asks:
        return JointOutput(image, None, heat)
    return JointOutput(
        image, _summed(plan, "text", _text_rows([term for _, term in plan.terms_of("text")], layer)), heat
    )


def _image_rows(plan: JointPlan, layer: JointLayer, columns: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The products of the plan's terms of image tokens, and behind them those of its watched rows, of columns alone."""
    of_rows = plan.terms_of("image")
    values = layer.values([term for _, term in of_rows])
    if plan.watched:
        of_rows += tuple((row, JointProduct.own(row)) for row in plan.watched)
        values = functional.pad(values, (*(0, 0) * 3, 0, len(plan.watched)))
    if columns:
        assert layer.text is not None
        start, stop = layer.text_tokens
        behind = 0 if layer.references_first else layer.references
        values = torch.cat([values, column_values(of_rows, columns, values, stop - start, behind)], dim=-1)
    return _image_map([term for _, term in of_rows], layer) @ values


def text_maps(plan: JointPlan, rows: Sequence[int], layer: JointLayer) -> dict[int, LinearMap]:
    """How the image of some rows attends to the text: the text's columns of the one softmax over both.

    They are the softmax over the text's keys alone, times the share of each image token's attention that the text has,
    which is a product of the whole map with the text's indicator. Detached.

    Returns:
        By row [H, 1, N, T], a head a row.
    """
    if not rows:
        return {}
    assert layer.text is not None
    start, stop = layer.text_tokens
    # Of terms whose text values are zeros the columns count in the softmax and give nothing.
    of_rows = [(row, term) for row, term in plan.terms_of("image") if row in rows and term.value.text is not None]
    shares = _text_shares([term for _, term in of_rows], layer) if of_rows else ()
    summands: dict[int, list[LinearMap]] = {row: [] for row in rows}
    for (row, term), share in zip(of_rows, shares, strict=True):
        # Queries and keys are always of a row; None stands for values alone.
        assert term.query.image is not None
        assert term.key.text is not None
        query = layer.images(layer.image.query, [(term.query.image, term.key.text)])[0].detach()
        key = tokens_of(layer.text.key, [term.key.text])[0].detach()
        key = key[..., start:stop, :].repeat_interleave(len(query) // len(key), dim=0)
        whole = layer.map_over_texts(query.unsqueeze(1), key.unsqueeze(1), [term.key.text] * len(query))
        alone = whole.scale_rows(share.unsqueeze(1))
        if not term.is_whole:
            weight = _weight(term.weight, share.unsqueeze(-1), share.dtype, is_text=False)
            alone = alone.scale_rows(weight if isinstance(weight, float) else weight[None, None, :, 0])
        summands[row].append(alone if term.mixing is None else alone.mix(term.mixing.to(share)))
    return {row: functools.reduce(operator.add, parts) for row, parts in summands.items() if parts}


def _text_shares(terms: Sequence[JointProduct], layer: JointLayer) -> torch.Tensor:
    """For each term how much of each image token's attention its text has: [terms, H, N]."""
    assert layer.text is not None
    indicator = torch.zeros_like(layer.values(terms)[..., :1])
    start, stop = (layer.image.value.tensor.shape[2] + place for place in layer.text_tokens)
    indicator[:, :, start:stop] = 1.0
    return (_image_map(terms, layer) @ indicator).detach()[..., 0]


def _image_map(terms: Sequence[JointProduct], layer: JointLayer) -> LinearMap:
    """For each term the map of its image queries over image keys and text keys: [terms, H, N, N + T]."""
    whole = _shared(layer, [(term.query.image, term.key.image) for term in terms], "image")
    if layer.text is None:
        return whole
    return join([whole, _shared(layer, [(term.query.image, term.key.text) for term in terms], "text")])


def _shared(layer: JointLayer, named: Sequence[tuple[Any, Any]], segment: Literal["image", "text"]) -> LinearMap:
    """For each (image query, key of a segment) its map, of which equal ones are one."""
    pairs, index = _distinct(named)
    rows = [row for _, row in pairs]
    if segment == "image":
        queries = layer.images(layer.image.query, [(query, query) for query, _ in pairs])
        return layer.map(queries, layer.images(layer.image.key, [(key, query) for query, key in pairs])).take(index)
    assert layer.text is not None
    queries = layer.images(layer.image.query, pairs)
    return layer.map_over_texts(queries, tokens_of(layer.text.key, rows), rows).take(index)


def _text_rows(terms: Sequence[JointProduct], layer: JointLayer) -> torch.Tensor:
    assert layer.text is not None
    triples, index = _distinct([(term.query.text, *term.key) for term in terms])
    queries = tokens_of(layer.text.query, [query for query, _, _ in triples])
    keys = layer.keys([(image, text) for _, image, text in triples])
    asking, texts = [query for query, _, _ in triples], [text for _, _, text in triples]
    return layer.map_over_texts(queries, keys, texts, asking).take(index) @ layer.values(terms)


def _distinct(named: Sequence[tuple[Any, ...]]) -> tuple[list[tuple[Any, ...]], list[int]]:
    """What there is, each once, and for each entry which of those it is."""
    places: dict[Hashable, int] = {}
    index = [places.setdefault(entry, len(places)) for entry in named]
    return list(dict.fromkeys(named)), index


def _summed(plan: JointPlan, segment: Literal["image", "text"], products: torch.Tensor) -> torch.Tensor:
    """A segment's terms [terms, H, N, E], weighed and added up by row."""
    terms = plan.terms_of(segment)
    if len(terms) == plan.rows and all(term.is_whole for _, term in terms):
        return products
    wide = torch.promote_types(products.dtype, torch.float32)
    sums: list[torch.Tensor | None] = [None] * plan.rows
    for (row, term), product in zip(terms, products, strict=True):
        weighed = product.to(wide) * _weight(term.weight, product, wide, is_text=segment == "text")
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
