"""Maps of several: blended, one after the other along the batch, or one under the other along the queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import indices, validation
from .composition import Combination, LinearMap
from .normal_form import Block, Cut, Term, adjoint_of, product_of, sum_of_blocks, taken


def blend(weight: float | Sequence[float] | Tensor, first: LinearMap, second: LinearMap) -> LinearMap:
    """``weight ⊙ first + (1 − weight) ⊙ second``: soft and regional replacement of one map by another.

    Args:
        weight: as in :meth:`LinearMap.scale_rows`; 1 takes ``first``, 0 takes ``second``. A tensor [N] blends by query
            pixel. Where it is 0 or 1 for a block of query rows, a fused kernel leaves out the other map there.
        first, second: maps of equal shape [B, H, N, M], dtype and device.

    Returns:
        The blended map, [B, H, N, M].

    Raises:
        ValueError, TypeError: maps that differ, or a weight of another shape or kind.
    """
    check_maps("blend", (first, second))
    validation.check_same_map(first, second)
    if isinstance(weight, (int, float)) and not isinstance(weight, bool):
        return first.scale_rows(weight) + second.scale_rows(1.0 - weight)
    checked = validation.check_row_weight(weight, first, first.shape)
    return first.scale_rows(checked) + second.scale_rows(1.0 - checked)


def concatenate(maps: Sequence[LinearMap]) -> LinearMap:
    """Maps one after the other along the batch, as one map: what they share is computed once.

    Prompt-to-Prompt's source row and its edited row, in one pass over the source's scores::

        edited = A_src.mix(M).scale_columns(alpha) + A_tgt.scale_columns(1 - alpha)
        concatenate([A_src, edited]) @ torch.cat([v_src, v_tgt])

    Args:
        maps: [B_i, H, N, M] each, of one dtype and device.

    Returns:
        The map [B_0 + B_1 + …, H, N, M].

    Raises:
        ValueError, TypeError: no maps, or maps that differ in more than their batch.
    """
    check_maps("concatenate", maps)
    for other in maps[1:]:
        validation.check_same_map(maps[0], other, batch=False)
    return Combination(tuple(block for part in maps for block in part._blocks()))


def beside(maps: Sequence[LinearMap]) -> LinearMap:
    """Maps of the same queries side by side along the keys, as they are: ``[A₁ | A₂ | …]``.

    Rows are not normalised again; the softmax over all of the keys is :func:`join`. Equivalent PyTorch, maps dense::

        torch.cat([A.dense() for A in maps], dim=-1)

    The rule of ReFlex for the image rows, in blocks of text (T) and image (I) keys after the softmax::

        beside([A_target.block(keys=T), A_source.block(keys=I)])

    Args:
        maps: [B, H, N, M_i], of one dtype and device.

    Returns:
        A map [B, H, N, Σ M_i]; lazy.

    Raises:
        TypeError, ValueError: for what is no map, and for maps that do not fit.
    """
    check_maps("beside", maps)
    for other in maps[1:]:
        validation.check_same_rows(maps[0], other)
    tokens, start, total = sum(part.shape[3] for part in maps), 0, None
    for part in maps:
        cut = Cut(start, start + part.shape[3], tokens)
        start = cut.stop
        blocks = part._followed_by(cut)._blocks()
        total = blocks if total is None else sum_of_blocks(total, blocks)
    assert total is not None
    return Combination(total)


class StackedMap(LinearMap):
    """Maps of the same keys one under the other along the queries; :func:`stack` makes it."""

    def __init__(self, parts: Sequence[LinearMap]) -> None:
        self.parts = tuple(parts)
        stops = torch.Size(part.shape[2] for part in self.parts)
        self._stops = [sum(stops[: place + 1]) for place in range(len(stops))]

    @property
    def shape(self) -> torch.Size:
        batch, heads, _, keys = self.parts[0].shape
        return torch.Size((batch, heads, self._stops[-1], keys))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def key_heads(self) -> int:
        heads = {part.key_heads for part in self.parts}
        return heads.pop() if len(heads) == 1 else self.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def requires_grad(self) -> bool:
        """Whether any of the parts takes part in gradients."""
        return any(term.requires_grad for part in self.parts for block in part._blocks() for term in block.terms)

    def __repr__(self) -> str:
        return f"StackedMap(shape={tuple(self.shape)}, dtype={self.dtype}, parts={len(self.parts)})"

    def _blocks(self) -> tuple[Block, ...]:
        return (Block((Term(self, tuple(range(self.shape[0]))),)),)

    def _ranges(self) -> list[tuple[LinearMap, slice]]:
        starts = [0, *self._stops[:-1]]
        return [(part, slice(*ends)) for part, *ends in zip(self.parts, starts, self._stops, strict=True)]

    def gathered_product(self, value: Tensor, index: tuple[int, ...], weight: Tensor | None) -> Tensor:
        outs = []
        for part, rows in self._ranges():
            some = part.take(index)
            if weight is not None:
                some = some.scale_rows(weight if weight.shape[2] == 1 else weight[:, :, rows])
            outs.append(product_of(some._blocks(), value))
        # Joined in the memory order of a product, [B, N, H, E], so that merging heads stays a view.
        return torch.cat([out.transpose(1, 2) for out in outs], dim=1).transpose(1, 2)

    def gathered_adjoint(self, weight: Tensor, index: tuple[int, ...]) -> Tensor:
        adjoints = [adjoint_of(taken(part._blocks(), index), weight[:, :, rows]) for part, rows in self._ranges()]
        return sum(adjoints[1:], adjoints[0])

    def queries(self, start: int, stop: int | None = None) -> StackedMap:
        """The rows of a range of the query tokens; only the parts that it meets."""
        start, stop = indices.check_range("query tokens", start, stop, self.shape[2])
        parts = []
        for part, rows in self._ranges():
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                parts.append(part.queries(first - rows.start, last - rows.start))
        return StackedMap(parts)


def stack(maps: Sequence[LinearMap]) -> LinearMap:
    """Maps of the same keys one under the other along the queries: ``[A₁ ; A₂ ; …]``.

    Text and image queries of a joint attention, each with a rule of its own. Equivalent PyTorch, maps dense::

        torch.cat([A.dense() for A in maps], dim=-2)

    Args:
        maps: [B, H, N_i, M], of one dtype and device.

    Returns:
        A map [B, H, Σ N_i, M]; lazy. A product computes every part once and copies nothing but its output.

    Raises:
        TypeError, ValueError: for what is no map, and for maps that do not fit.
    """
    check_maps("stack", maps)
    for other in maps[1:]:
        validation.check_same_columns(maps[0], other)
    return maps[0] if len(maps) == 1 else StackedMap(maps)


def check_maps(name: str, maps: Sequence[object]) -> None:
    """Refuse what is no list of maps, an empty one, and what is no map."""
    # A map is a sequence of its batch rows: taken for one of maps, its rows would be put together.
    if isinstance(maps, LinearMap) or not isinstance(maps, Sequence):
        raise TypeError(f"{name} takes a list of maps, got {type(maps).__name__}: write {name}([first, second]).")
    if not maps:
        raise ValueError(f"{name}([]) has no map; pass at least one.")
    for candidate in maps:
        if not isinstance(candidate, LinearMap):
            raise TypeError(
                f"{name} takes maps (LinearMap), got {type(candidate).__name__}. "
                "For products that are computed already, use torch's own arithmetic."
            )
