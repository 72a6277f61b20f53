"""The normal form of a combination of attention maps, and how its products are computed.

Batch rows come in blocks; in a block,

    out_b = Σ_t  r_tb ⊙ A_t[index_t(b)] · F_t1 · F_t2 ⋯ v_b

with row weights r (a number for each query), maps A, and factors F on the side of the values (weights of the columns,
a mixing matrix, or a range of the tokens). A product transforms the values for every term, stacks those of terms that
share an ``AttentionMap`` as batch rows of one call, so that its scores and its softmax are computed once, and adds the
results. The transpose runs the same sum backwards: r ⊙ w, Aᵀ, then the factors' transposes in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from .given import given
from .precision import at_given_dtype
from .validation import accumulator_dtype


class GatheredMap(Protocol):
    """What a term asks of its map: products in which batch row ``b`` uses row ``index[b]`` of the maps."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def key_heads(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def requires_grad(self) -> bool: ...
    def gathered_product(self, value: Tensor, index: tuple[int, ...], weight: Tensor | None) -> Tensor: ...
    def gathered_adjoint(self, weight: Tensor, index: tuple[int, ...]) -> Tensor: ...
    def queries(self, start: int, stop: int | None = None) -> GatheredMap: ...
    def rows_at(self, index: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Diagonal:
    """A weight for every column of a map: v -> weight ⊙ v."""

    weight: Tensor  # [1 | B, 1 | H, M, 1]

    def __call__(self, value: Tensor) -> Tensor:
        return self.weight * value

    def transposed(self, result: Tensor) -> Tensor:
        return self.weight * result

    def some_rows(self, rows: Sequence[int]) -> Diagonal:
        return Diagonal(gathered_rows(self.weight, rows))


@dataclass(frozen=True, eq=False)
class Mixing:
    """A matrix on the value's tokens: v -> matrix @ v."""

    matrix: Tensor  # [1 | B, 1 | H, M, M']

    def __call__(self, value: Tensor) -> Tensor:
        with at_given_dtype(value.device):
            return self.matrix @ value

    def transposed(self, result: Tensor) -> Tensor:
        with at_given_dtype(result.device):
            return self.matrix.transpose(-1, -2) @ result

    def some_rows(self, rows: Sequence[int]) -> Mixing:
        return Mixing(gathered_rows(self.matrix, rows))


@dataclass(frozen=True, eq=False)
class Cut:
    """A range of the value's tokens, which have more: v -> v[start:stop]."""

    start: int
    stop: int
    tokens: int

    def __call__(self, value: Tensor) -> Tensor:
        return value[:, :, self.start : self.stop]

    def transposed(self, result: Tensor) -> Tensor:
        return torch.nn.functional.pad(result, (0, 0, self.start, self.tokens - self.stop))

    def some_rows(self, rows: Sequence[int]) -> Cut:
        return self


@dataclass(frozen=True, eq=False)
class Padding:
    """The transpose of :class:`Cut`: the value is a range of ``tokens``, and zero elsewhere."""

    start: int
    stop: int
    tokens: int

    def __call__(self, value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value, (0, 0, self.start, self.tokens - self.stop))

    def transposed(self, result: Tensor) -> Tensor:
        return result[:, :, self.start : self.stop]

    def some_rows(self, rows: Sequence[int]) -> Padding:
        return self


Factor = Diagonal | Mixing | Cut | Padding


def tensors_of(factors: Sequence[Factor]) -> list[Tensor]:
    """What they hold."""
    weights = [factor.weight for factor in factors if isinstance(factor, Diagonal)]
    return weights + [factor.matrix for factor in factors if isinstance(factor, Mixing)]


def tokens_after(factors: Sequence[Factor], tokens: int) -> int:
    """The tokens of the value that the last factor meets, where the first gives ``tokens``."""
    for factor in factors:
        if isinstance(factor, Mixing):
            tokens = factor.matrix.shape[-1]
        elif isinstance(factor, Cut):
            tokens = factor.tokens
        elif isinstance(factor, Padding):
            tokens = factor.stop - factor.start
    return tokens


@dataclass(frozen=True, eq=False)
class Term:
    """``number · row_weight ⊙ map[index] · factors``; the last factor meets the value first."""

    map: GatheredMap
    index: tuple[int, ...]
    number: float = 1.0
    row_weight: Tensor | None = None  # [1 | B, 1 | H, 1 | N]
    factors: tuple[Factor, ...] = ()

    def weighted(self, weight: Tensor) -> Term:
        if self.row_weight is not None:  # wide, since a product of weights leaves the range of half precision
            weight = self.row_weight.to(accumulator_dtype(self.map.dtype)) * weight
        return replace(self, row_weight=weight)

    def followed_by(self, factor: Factor) -> Term:
        return replace(self, factors=(*self.factors, factor))

    @property
    def plain(self) -> bool:
        """Whether it is rows of its map as they are."""
        return self.number == 1.0 and self.row_weight is None and not self.factors

    def of_queries(self, part: GatheredMap, start: int, stop: int) -> Term:
        """That of the query tokens ``start`` to ``stop``, of which ``part`` is the map."""
        weight = self.row_weight
        if weight is not None and weight.shape[2] > 1:
            weight = weight[:, :, start:stop]
        return replace(self, map=part, row_weight=weight)

    def some_rows(self, rows: Sequence[int]) -> Term:
        return replace(
            self,
            index=tuple(self.index[row] for row in rows),
            row_weight=None if self.row_weight is None else gathered_rows(self.row_weight, rows),
            factors=tuple(factor.some_rows(rows) for factor in self.factors),
        )

    @property
    def requires_grad(self) -> bool:
        """Whether gradients go into it."""
        tensors = [*([] if self.row_weight is None else [self.row_weight]), *tensors_of(self.factors)]
        return self.map.requires_grad or any(tensor.requires_grad for tensor in tensors)

    def whole_weight(self) -> Tensor | None:
        """Number and weight as one tensor [1 | B, 1 | H, 1 | N]; None for one throughout."""
        if self.number == 1.0:
            return self.row_weight
        dtype = accumulator_dtype(self.map.dtype)
        if self.row_weight is None:
            return torch.full((1, 1, 1), self.number, dtype=dtype, device=self.map.device)
        return self.number * self.row_weight.to(dtype)


@dataclass(frozen=True, eq=False)
class Block:
    """Some batch rows, one after the other, and the terms that add up to each of them."""

    terms: tuple[Term, ...]

    @property
    def rows(self) -> int:
        return len(self.terms[0].index)

    def some_rows(self, rows: Sequence[int]) -> Block:
        if list(rows) == list(range(self.rows)):
            return self
        return Block(tuple(term.some_rows(rows) for term in self.terms))


def some_rows(tensor: Tensor, rows: slice) -> Tensor:
    return tensor if tensor.shape[0] == 1 else tensor[rows]


def gathered_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """``tensor[rows]``, or the one row that ``tensor`` has for all.

    From slices: an index tensor would have to be copied to the device.
    """
    if tensor.shape[0] == 1:
        return tensor
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    return torch.cat([tensor[row : row + 1] for row in rows])


def sum_of_blocks(first: tuple[Block, ...], second: tuple[Block, ...]) -> tuple[Block, ...]:
    """Blocks cut where either is cut, with the terms of both.

    A term of weight 0 is left out where another remains, unless its gradients, which are zero, may be asked for.
    """
    cuts = sorted({*starts_of(first), *starts_of(second)})
    blocks = []
    for start, stop in pairwise(cuts):
        rows = range(start, stop)
        terms = (*_rows_within_a_block(first, rows).terms, *_rows_within_a_block(second, rows).terms)
        blocks.append(Block(tuple(term for term in terms if term.number != 0.0 or term.requires_grad) or terms[:1]))
    return tuple(blocks)


def starts_of(blocks: tuple[Block, ...]) -> list[int]:
    """The first row of every block, and after them the number of rows."""
    starts = [0]
    for block in blocks:
        starts.append(starts[-1] + block.rows)
    return starts


def _rows_within_a_block(blocks: tuple[Block, ...], rows: Sequence[int]) -> Block:
    start = 0
    for block in blocks:
        if start <= rows[0] < start + block.rows:
            return block.some_rows([row - start for row in rows])
        start += block.rows
    raise IndexError(f"no block has the rows {list(rows)}")


def taken(blocks: tuple[Block, ...], index: tuple[int, ...]) -> tuple[Block, ...]:
    """The rows ``index``; neighbours from one block stay in one block."""
    owner = [number for number, block in enumerate(blocks) for _ in range(block.rows)]
    runs: list[list[int]] = []
    for row in index:
        if runs and owner[runs[-1][-1]] == owner[row]:
            runs[-1].append(row)
        else:
            runs.append([row])
    return tuple(_rows_within_a_block(blocks, run) for run in runs)


def bytes_of(blocks: tuple[Block, ...]) -> int:
    """Bytes of the distinct maps, and of every term's row weight and factors."""
    terms = [term for block in blocks for term in block.terms]
    tensors = [term.row_weight for term in terms if term.row_weight is not None]
    for term in terms:
        tensors += tensors_of(term.factors)
    maps = sum(terms[group[0]].map.nbytes for group in terms_by_map(terms))
    return maps + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def terms_by_map(terms: list[Term]) -> list[list[int]]:
    """The positions of the terms of each distinct map, in order of appearance."""
    groups: list[list[int]] = []
    for position, term in enumerate(terms):
        for group in groups:
            if terms[group[0]].map is term.map:
                group.append(position)
                break
        else:
            groups.append([position])
    return groups


def product_of(blocks: tuple[Block, ...], value: Tensor) -> Tensor:
    def of_map(some: list[Term], operands: list[Tensor]) -> Tensor:
        for position, term in enumerate(some):
            for factor in reversed(term.factors):
                operands[position] = factor(operands[position])
        index = tuple(entry for term in some for entry in term.index)
        return some[0].map.gathered_product(_stacked(operands), index, _stacked_weights(some))

    return _evaluated(blocks, value, of_map, lambda term, result: result)


def adjoint_of(blocks: tuple[Block, ...], weight: Tensor) -> Tensor:
    def of_map(some: list[Term], operands: list[Tensor]) -> Tensor:
        for position, term in enumerate(some):
            if (rows := term.whole_weight()) is not None:
                operands[position] = (rows.unsqueeze(-1) * operands[position]).to(weight.dtype)
        index = tuple(entry for term in some for entry in term.index)
        return some[0].map.gathered_adjoint(_stacked(operands), index)

    def through_factors(term: Term, result: Tensor) -> Tensor:
        for factor in term.factors:
            result = factor.transposed(result)
        return result

    return _evaluated(blocks, weight, of_map, through_factors)


def rows_of(blocks: tuple[Block, ...], index: Tensor) -> Tensor:
    """The rows of the query tokens ``index``, [B, H, len(index), M'], of maps that give theirs."""
    known: dict[int, Tensor] = {}
    parts = []
    for block in blocks:
        terms = []
        for term in block.terms:
            if id(term.map) not in known:
                known[id(term.map)] = term.map.rows_at(index)
            rows = gathered_rows(known[id(term.map)], term.index)
            if (weight := term.whole_weight()) is not None:
                weight = weight if weight.shape[2] == 1 else weight[:, :, index]
                rows = (weight.unsqueeze(-1) * rows).to(rows.dtype)
            for factor in term.factors:
                rows = factor.transposed(rows.transpose(-1, -2)).transpose(-1, -2)
            terms.append(rows)
        parts.append(sum(terms[1:], terms[0]).expand(block.rows, -1, -1, -1))
    return _stacked(parts)


def _evaluated(
    blocks: tuple[Block, ...],
    operand: Tensor,
    of_map: Callable[[list[Term], list[Tensor]], Tensor],
    finished: Callable[[Term, Tensor], Tensor],
) -> Tensor:
    """One call of ``of_map`` for each distinct map; its results, ``finished``, summed by block and stacked."""
    parts = [operand[start:stop] for start, stop in pairwise(starts_of(blocks))]
    terms = [(number, term) for number, block in enumerate(blocks) for term in block.terms]
    sums: list[Tensor | None] = [None] * len(blocks)
    for group in terms_by_map([term for _, term in terms]):
        numbers, some = [terms[position][0] for position in group], [terms[position][1] for position in group]
        stacked = of_map(some, [parts[number] for number in numbers])
        results = torch.split(stacked, [len(term.index) for term in some]) if len(some) > 1 else (stacked,)
        for number, term, result in zip(numbers, some, results, strict=True):
            so_far = sums[number]
            result = finished(term, result)
            sums[number] = result if so_far is None else so_far + result
    return _stacked([total for total in sums if total is not None])


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _stacked_weights(terms: list[Term]) -> Tensor | None:
    """The row weights of ``terms`` as [ΣB, 1 | H, 1 | N], or None where all are one."""
    weights = [term.whole_weight() for term in terms]
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    if len(terms) == 1:
        return given[0]
    heads, queries = (max(weight.shape[axis] for weight in given) for axis in (1, 2))
    dtype = given[0].dtype
    for weight in given[1:]:
        dtype = torch.promote_types(dtype, weight.dtype)
    one = given[0].new_ones((1, 1, 1), dtype=dtype)
    return torch.cat(
        [
            (one if weight is None else weight.to(dtype)).expand(len(term.index), heads, queries)
            for term, weight in zip(terms, weights, strict=True)
        ]
    )


def columns_at_once(product: Callable[[Tensor], Tensor], operand: Any, check: Callable[[object], Tensor]) -> Any:
    """``product`` of one operand, or of several side by side."""
    if not isinstance(operand, (tuple, list)):
        return given(product(check(operand)))
    if not operand:
        raise ValueError("A @ () has no value to multiply with; pass at least one [B, H, M, E].")
    parts = [check(part) for part in operand]
    if len(parts) == 1:
        return (given(product(parts[0])),)
    heads = max(part.shape[1] for part in parts)  # some values may have as many as the keys, others those of the map
    parts = [part if part.shape[1] == heads else part.repeat_interleave(heads // part.shape[1], 1) for part in parts]
    # The copy is one part in N of the product. Parts that lie side by side in memory could do without, but to find that
    # out means to look at storages, which tracing hides and autograd forbids; who has the whole tensor passes it whole.
    whole, stops = product(torch.cat(parts, dim=-1)), list(accumulate(part.shape[-1] for part in parts))
    # Not `torch.split`, of whose views none may be changed in place.
    return tuple(given(whole[..., stop - part.shape[-1] : stop]) for part, stop in zip(parts, stops, strict=True))
