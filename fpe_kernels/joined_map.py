"""``join``: maps over disjoint keys and the same queries, normalised together.

With the products O_i and the log-sum-exps L_i of the parts, each of which is normalised over its own keys,

    L = log Σ_i exp(L_i),   w_i = exp(L_i − L)
    join(A) @ v = Σ_i w_i ⊙ (A_i @ v_i),   join(A).T @ u = [A_i.T @ (w_i ⊙ u)]_i

for each query row. The parts' products are float32 (float64 beside float64) until they are merged, and rounded once. A
row without keys in a part has L_i = −∞ there, and so w_i = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from . import indices, validation
from .attention_map import AttentionMap
from .combining import check_maps
from .composition import LinearMap
from .normal_form import Block, adjoint_of, gathered_rows, starts_of, taken, terms_by_map
from .partial_softmax import merged_products, total_logsumexp
from .softmax_map import SoftmaxMap, softmax_blocks


class JoinedMap(SoftmaxMap, LinearMap):
    """Maps over disjoint keys, normalised together; :func:`join` makes it."""

    def __init__(self, parts: Sequence[LinearMap]) -> None:
        self.parts = tuple(parts)
        self._of_parts = [softmax_blocks(part, "join normalises over all keys together") for part in self.parts]
        stops = [part.shape[3] for part in self.parts]
        self._stops = [sum(stops[: place + 1]) for place in range(len(stops))]

    @property
    def shape(self) -> torch.Size:
        """(B, H, N, Σ M_i)."""
        return torch.Size((*self.parts[0].shape[:3], self._stops[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """That of the parts."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """That of the parts."""
        return self.parts[0].device

    @property
    def key_heads(self) -> int:
        """Heads of the keys, where the parts agree; else H."""
        heads = {part.key_heads for part in self.parts}
        return heads.pop() if len(heads) == 1 else self.shape[1]

    @property
    def requires_grad(self) -> bool:
        """Whether any of the parts takes part in gradients."""
        return any(block.terms[0].requires_grad for blocks in self._of_parts for block in blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements that define the distinct maps of the parts."""
        terms = [block.terms[0] for blocks in self._of_parts for block in blocks]
        return sum(terms[group[0]].map.nbytes for group in terms_by_map(terms))

    def __repr__(self) -> str:
        return (
            f"JoinedMap(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', "
            f"keys={[part.shape[3] for part in self.parts]})"
        )

    def _ranges(self) -> Iterator[tuple[LinearMap, tuple[Block, ...], slice]]:
        """Every part with its blocks and its keys."""
        for part, blocks, stop in zip(self.parts, self._of_parts, self._stops, strict=True):
            yield part, blocks, slice(stop - part.shape[3], stop)

    def gathered_product(self, value: Tensor, index: tuple[int, ...], weight: Tensor | None) -> Tensor:
        last = None if self._records_gradients(value, weight) else self._last()
        if last is None:
            out, _ = self.gathered_with_logsumexp(value, index)
            return (out if weight is None else weight.unsqueeze(-1) * out).to(self.dtype)
        blocks, keys = self._of_parts[last], self._keys(last)
        prior, logsumexp = self._merged(value, index, [place for place in range(len(self.parts)) if place != last])
        (term,) = taken(blocks, index)[0].terms
        whole = cast(AttentionMap, term.map)
        return whole.gathered_merge(value[:, :, keys], term.index, weight, prior, logsumexp.expand(prior.shape[:3]))

    def gathered_with_logsumexp(self, value: Tensor, index: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self._merged(value, index, range(len(self.parts)))

    def _merged(self, value: Tensor, index: tuple[int, ...], places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The wide product over the keys of some parts, and its log-sum-exp."""
        total: tuple[Tensor, Tensor] | None = None
        for place in places:
            product = _product_with_logsumexp(taken(self._of_parts[place], index), value[:, :, self._keys(place)])
            total = product if total is None else merged_products(total, product)
        assert total is not None
        return total

    def _records_gradients(self, value: Tensor, weight: Tensor | None) -> bool:
        leaves = value.requires_grad or self.requires_grad or (weight is not None and weight.requires_grad)
        return torch.is_grad_enabled() and leaves

    def _last(self) -> int | None:
        """The part that can take up the product of the others, and of such the one with the fewest keys."""
        last = None
        for place, blocks in enumerate(self._of_parts if len(self.parts) > 1 else ()):
            fits = len(blocks) == 1 and isinstance(blocks[0].terms[0].map, AttentionMap)
            # Not `min` with a key, which torch.compile cannot trace.
            if fits and (last is None or self.parts[place].shape[3] < self.parts[last].shape[3]):
                last = place
        return last

    def _keys(self, place: int) -> slice:
        return slice(self._stops[place] - self.parts[place].shape[3], self._stops[place])

    def gathered_adjoint(self, weight: Tensor, index: tuple[int, ...]) -> Tensor:
        adjoints = []
        for (_, blocks, _), share in zip(self._ranges(), self._shares(), strict=True):
            weighted = (gathered_rows(share, index).unsqueeze(-1) * weight).to(weight.dtype)
            adjoints.append(adjoint_of(taken(blocks, index), weighted))
        # In the memory order of a product, [B, M, H, E].
        return torch.cat([part.transpose(1, 2) for part in adjoints], dim=1).transpose(1, 2)

    @property
    def logsumexp(self) -> Tensor:
        """[B, H, N], float32 (float64 beside float64): log Σ_m exp(scores) over the keys of all parts."""
        return total_logsumexp([_logsumexp(blocks) for blocks in self._of_parts])

    def _shares(self) -> list[Tensor]:
        """[B, H, N] for every part: its share of each row's sum."""
        statistics = [_logsumexp(blocks) for blocks in self._of_parts]
        total = total_logsumexp(statistics)
        finite = torch.where(total.isneginf(), 0.0, total)
        return [torch.exp(own - finite) for own in statistics]

    def queries(self, start: int, stop: int | None = None) -> JoinedMap:
        """The map of a range of the query tokens, normalised over the same keys."""
        return JoinedMap([part.queries(start, stop) for part in self.parts])

    def keys(self, start: int, stop: int | None = None) -> JoinedMap:
        """The softmax over a range of the key tokens alone; only the parts that it meets."""
        start, stop = indices.check_range("key tokens", start, stop, self.shape[3], empty=True)
        parts = []
        for part, _, keys in self._ranges():
            first, last = max(start, keys.start), min(stop, keys.stop)
            if first < last:
                parts.append(part.keys(first - keys.start, last - keys.start))
        return JoinedMap(parts or [self.parts[0].keys(0, 0)])

    def wide_rows(self, index: Tensor) -> Tensor:
        rows = [
            share[:, :, index].unsqueeze(-1) * _gathered_view(blocks, lambda whole: whole.wide_rows(index))
            for blocks, share in zip(self._of_parts, self._shares(), strict=True)
        ]
        return torch.cat(rows, dim=-1)

    def wide_columns(self, index: Tensor) -> Tensor:
        # Which part a position lies in is known on the device: every part gives a column, of zeros where it is no
        # position of its own.
        columns = None if self.shape[3] else self._shares()[0].new_zeros((*self.shape[:3], index.numel()))
        for (_, blocks, keys), share in zip(self._ranges(), self._shares(), strict=True):
            if keys.stop == keys.start:
                continue
            inside = (index >= keys.start) & (index < keys.stop)
            own = (index - keys.start).clamp(0, keys.stop - keys.start - 1)
            some = share.unsqueeze(-1) * _gathered_view(blocks, partial(_wide_columns, index=own))
            some = torch.where(inside, some, 0.0)
            columns = some if columns is None else columns + some
        assert columns is not None
        return columns


def join(maps: Sequence[LinearMap]) -> LinearMap:
    """Maps over disjoint keys and the same queries, normalised together: one softmax over all of their keys.

    Where the parts have the same queries it is the map over the concatenated keys, which it never makes; and each part
    may have queries of its own, and be shared by rows whose other parts are private. Equivalent PyTorch, scores dense::

        torch.softmax(torch.cat([scores_1, scores_2], dim=-1), dim=-1)    # [B, H, N, M_1 + M_2]

    Image rows of a joint attention, with the source's queries and image keys and the text of each row: the image part,
    nearly all of the work, is computed once for all rows::

        image = AttentionMap(q_source, k_source)                          # [1, H, N, M]
        text = AttentionMap(q_source.expand(rows, -1, -1, -1), k_text)    # [rows, H, N, T]
        join([text, image.take([0] * rows)]) @ torch.cat([v_text, v_image], dim=2)

    It is lazy and a :class:`LinearMap`: products, transpose, rows, columns, ranges, gradients, and ``blend``, ``mix``,
    ``scale_columns`` and sums with other maps. Products of the parts are merged in float32 (float64 beside float64) and
    rounded once; extra memory is that of two such products.

    Args:
        maps: [B, H, N, M_i], of one dtype and device, each a softmax in every row: attention maps, joined maps, their
            ranges and gathers. M_i may be 0, and rows may be masked throughout in some parts.

    Returns:
        A map [B, H, N, Σ M_i], whose keys are those of the parts in order.

    Raises:
        TypeError: for what is no map, and for maps that are not one softmax in each row.
        ValueError: for maps that do not agree in [B, H, N], dtype or device.

    >>> from fpe_kernels import AttentionMap
    >>> query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    >>> A = AttentionMap(query, key)
    >>> (join([A.keys(0, 2), A.keys(2)]) @ value).allclose(A @ value, atol=1e-6)
    True
    """
    check_maps("join", maps)
    for other in maps[1:]:
        validation.check_same_rows(maps[0], other)
    parts: list[LinearMap] = []
    for candidate in maps:
        parts += candidate.parts if isinstance(candidate, JoinedMap) else [candidate]
    parts = [part for part in parts if part.shape[3]] or parts[:1]
    joined = JoinedMap(parts)
    return parts[0] if len(parts) == 1 else joined


def _product_with_logsumexp(blocks: tuple[Block, ...], value: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the rows of ``blocks``, one call for each distinct map, and their log-sum-exp."""
    terms, starts = [block.terms[0] for block in blocks], starts_of(blocks)
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for group in terms_by_map(terms):
        whole = cast(SoftmaxMap, terms[group[0]].map)
        index = tuple(entry for place in group for entry in terms[place].index)
        if len(group) == len(blocks) == 1:
            return whole.gathered_with_logsumexp(value, index)
        values = [value[starts[place] : starts[place + 1]] for place in group]
        out, logsumexp = whole.gathered_with_logsumexp(values[0] if len(values) == 1 else torch.cat(values), index)
        lengths = [blocks[place].rows for place in group]
        parts = zip(out.split(lengths), logsumexp.expand(out.shape[:3]).split(lengths), strict=True)
        results.update(zip(group, parts, strict=True))
    ordered = [results[place] for place in range(len(blocks))]
    return torch.cat([out for out, _ in ordered]), torch.cat([logsumexp for _, logsumexp in ordered])


def _logsumexp(blocks: tuple[Block, ...]) -> Tensor:
    """[B, H, N] of the rows of ``blocks``."""
    return _gathered_view(blocks, lambda whole: whole.logsumexp)


def _wide_columns(whole: SoftmaxMap, index: Tensor) -> Tensor:
    return whole.wide_columns(index)


def _gathered_view(blocks: tuple[Block, ...], view: Callable[[Any], Tensor]) -> Tensor:
    """``view`` of every map, once, and of it the rows that ``blocks`` name."""
    terms = [block.terms[0] for block in blocks]
    results: dict[int, Tensor] = {}
    for group in terms_by_map(terms):
        seen = view(terms[group[0]].map)
        for place in group:
            rows = gathered_rows(seen, terms[place].index)
            results[place] = rows.expand(len(terms[place].index), *rows.shape[1:])
    return results[0] if len(results) == 1 else torch.cat([results[place] for place in range(len(blocks))])
