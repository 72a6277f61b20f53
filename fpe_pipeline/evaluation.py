"""Computing a plan of products with ``shared_attention``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fpe_kernels import AttentionMap, shared_attention

from .products import AttentionCall, MapSpec, ProductPlan

__all__ = ["RowMap", "Rows", "evaluate", "evaluate_with_columns", "mask_bias", "row_map", "take"]

# Added to variances where queries and keys are normalised, as in instance normalisation.
_EPSILON = 1e-5


@dataclass(frozen=True)
class Rows:
    """Some rows of the batch, by their number in the whole batch."""

    tensor: torch.Tensor  # [len(rows), H, N, E]
    rows: tuple[int, ...]

    def take(self, rows: Sequence[int]) -> torch.Tensor:
        return take(self.tensor, [self.rows.index(row) for row in rows])

    def concatenated(self, groups: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """For each group of rows, their tokens one after the other: [len(groups), H, len(group)·M, E]."""
        if all(len(group) == 1 for group in groups):
            return self.take([row for (row,) in groups])
        return torch.stack([torch.cat([self.take([row])[0] for row in group], dim=-2) for group in groups])


def take(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """``tensor[rows]`` without an index tensor, which would have to be copied to the device; a view where it can be."""
    if len(rows) == tensor.shape[0] and all(row == index for index, row in enumerate(rows)):
        return tensor
    if not rows:
        return tensor[:0]
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([row, row + 1])
    pieces = [tensor[start:stop] for start, stop in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def evaluate(
    plan: ProductPlan,
    query: Rows,
    key: Rows,
    value: Rows,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The plan's products, summed by row: [plan.rows, H, N, E].

    Args:
        query, key, value: at least the rows that the plan names, as [rows, H, N | M, D | E].
        scale: what scores are multiplied with.
        bias: what is added to them, for every row of the batch: [plan.rows, 1 | H, 1 | N, M].
        backend: of ``shared_attention``.
    """
    return evaluate_with_columns(plan, query, key, value, {}, scale=scale, bias=bias, backend=backend)[0]


def evaluate_with_columns(
    plan: ProductPlan,
    query: Rows,
    key: Rows,
    value: Rows,
    columns: Mapping[int, torch.Tensor],
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """:func:`evaluate`, and beside it products of the rows' edited maps with columns of one's own.

    A row's output is linear in its values, so the columns are carried through the same products as more values:
    scores and softmax are computed once for both.

    Args:
        columns: for some rows, what their edited map is to be multiplied with: [M', C].

    Returns:
        The output, and for each row of ``columns`` its edited map times them: [H, N, C].
    """
    dim = value.tensor.shape[-1]
    wide = max([0, *(given.shape[-1] for given in columns.values())])
    sums: dict[int, torch.Tensor] = {}
    for call in plan.calls:
        values = _values(call, value)
        if wide:
            values = torch.cat([values, _column_values(call, columns, wide, values)], dim=-1)
        result = shared_attention(
            _queries(call.maps, query),
            _keys(call.maps, key),
            values,
            call.map_index,
            scale=scale,
            bias=_map_bias(call.maps, bias, key),
            backend=backend,
        )  # [len(products), H, N, E + wide]
        if plan.is_plain:
            return result[..., :dim], {row: result[row, ..., dim : dim + c.shape[-1]] for row, c in columns.items()}
        for row, product, term in zip(call.rows, call.products, result, strict=True):
            term = _weighted(term, product.weight)
            sums[row] = sums[row] + term if row in sums else term
    out = torch.stack([sums[row][..., :dim] for row in range(plan.rows)])
    return out, {row: sums[row][..., dim : dim + given.shape[-1]] for row, given in columns.items()}


class RowMap:
    """The edited attention map of one row, as an operator: a sum of weighted maps, each with its mixing.

    ``A @ x`` takes [M', E] or [H, M', E] to [H, N, E]; ``A.adjoint(y)`` takes [N, E] or [H, N, E] to [H, M', E].
    """

    def __init__(self, terms: Sequence[tuple[AttentionMap, float | torch.Tensor, torch.Tensor | None]]) -> None:
        self.terms = tuple(terms)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, N, M')."""
        attention, _, mixing = self.terms[0]
        _, heads, queries, keys = attention.shape
        return heads, queries, keys if mixing is None else mixing.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the queries and keys that it holds."""
        return sum(attention.nbytes for attention, _, _ in self.terms)

    def __matmul__(self, operand: torch.Tensor) -> torch.Tensor:
        total = None
        for attention, weight, mixing in self.terms:
            given = operand if mixing is None else mixing.to(operand) @ operand
            given = given.to(attention.query).expand(1, attention.shape[1], *given.shape[-2:])
            term = _weighted((attention @ given)[0], weight)
            total = term if total is None else total + term
        assert total is not None
        return total

    def adjoint(self, operand: torch.Tensor) -> torch.Tensor:
        """``Aᵀ @ operand``."""
        total = None
        for attention, weight, mixing in self.terms:
            given = operand.to(attention.query).expand(attention.shape[1], *operand.shape[-2:])
            term = (attention.T @ _weighted(given, weight)[None])[0]
            if mixing is not None:
                term = mixing.to(term).transpose(-1, -2) @ term
            total = term if total is None else total + term
        assert total is not None
        return total


def row_map(
    plan: ProductPlan,
    row: int,
    query: Rows,
    key: Rows,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> RowMap:
    """The edited map of a row of the plan; see :func:`evaluate` for the arguments. Detached, nothing computed yet."""
    terms = []
    for call in plan.calls:
        for owner, product in zip(call.rows, call.products, strict=True):
            if owner == row:
                maps = (product.map,)
                attention = AttentionMap(
                    _queries(maps, query).detach(),
                    _keys(maps, key).detach(),
                    scale=scale,
                    bias=_map_bias(maps, bias, key),
                    backend=backend,
                )
                terms.append((attention, product.weight, product.mixing))
    return RowMap(terms)


def mask_bias(mask: torch.Tensor | None, rows: int, heads: int, key: Rows) -> torch.Tensor | None:
    """A processor's ``attention_mask`` as a bias [B, 1 | H, 1 | N, M] of every row of the batch."""
    if mask is None:
        return None
    if mask.shape[-1] != key.tensor.shape[-2]:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} masks {mask.shape[-1]} keys; the layer has "
            f"{key.tensor.shape[-2]}: pad the mask to the keys' number"
        )
    if mask.ndim == 2:
        mask = mask[:, None]
    if mask.ndim == 3:  # [B, …] or, as Attention.prepare_attention_mask leaves it, [B·H, …]
        mask = mask.unflatten(0, (rows, heads)) if mask.shape[0] == rows * heads and heads > 1 else mask[:, None]
    if mask.ndim != 4 or mask.shape[0] not in (1, rows):
        raise ValueError(f"expected an attention_mask for a batch of {rows} rows, got shape {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=key.tensor.dtype).masked_fill_(~mask, float("-inf"))
    return mask.to(key.tensor.dtype).expand(rows, -1, -1, -1)


def _weighted(term: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    if not isinstance(weight, torch.Tensor) and weight == 1.0:
        return term
    if isinstance(weight, torch.Tensor) and weight.ndim:
        weight = weight[:, None]  # [N, 1], over heads and channels
    return term * (weight.to(term) if isinstance(weight, torch.Tensor) else weight)


def _queries(maps: Sequence[MapSpec], query: Rows) -> torch.Tensor:
    """The query of each map: [len(maps), H, N, D]."""
    if all(spec.style in (None, spec.query) for spec in maps):
        return query.take([spec.query for spec in maps])
    return torch.stack([_styled(query, spec.query, spec.style) for spec in maps])


def _keys(maps: Sequence[MapSpec], key: Rows) -> torch.Tensor:
    """The keys of each map: [len(maps), H, M, D]."""
    if all(spec.style is None for spec in maps):
        return key.concatenated([spec.keys for spec in maps])
    return torch.stack([torch.cat([_styled(key, row, spec.style) for row in spec.keys], dim=-2) for spec in maps])


def _styled(tensor: Rows, row: int, style: int | None) -> torch.Tensor:
    """A row [H, N, D] with the mean and standard deviation over tokens of another (adaptive instance normalisation)."""
    given = tensor.take([row])[0]
    if style is None or style == row:
        return given
    like = tensor.take([style])[0]
    # In half precision, a variance of large queries overflows.
    wide = torch.promote_types(given.dtype, torch.float32)
    (variance, mean), (goal_variance, goal_mean) = (
        torch.var_mean(x.to(wide), dim=-2, keepdim=True) for x in (given, like)
    )
    scale = ((goal_variance + _EPSILON) / (variance + _EPSILON)).sqrt()
    return ((given.to(wide) - mean) * scale + goal_mean).to(given.dtype)


def _values(call: AttentionCall, value: Rows) -> torch.Tensor:
    values = value.concatenated([product.values for product in call.products])
    if all(product.mixing is None for product in call.products):
        return values
    return torch.stack(
        [
            tokens if product.mixing is None else _mixed(product.mixing, tokens)
            for product, tokens in zip(call.products, values, strict=True)
        ]
    )


def _column_values(
    call: AttentionCall, columns: Mapping[int, torch.Tensor], wide: int, values: torch.Tensor
) -> torch.Tensor:
    """For each product its row's columns, mixed as its values are, and zeros beside them: [products, H, M, wide]."""
    out = values.new_zeros((*values.shape[:-1], wide))
    for operand, row, product in zip(out, call.rows, call.products, strict=True):
        if row in columns:
            given = columns[row].to(values)
            given = given if product.mixing is None else _mixed(product.mixing, given)
            if given.shape[-2] != values.shape[-2]:
                raise ValueError(
                    f"columns over {given.shape[-2]} tokens were asked of a map over {values.shape[-2]} keys: the text "
                    "encoder pads prompts to another length than the tokenizer that the words were found with"
                )
            operand[..., : given.shape[-1]] = given
    return out


def _mixed(mixing: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    if mixing.shape[-1] != tokens.shape[-2]:
        raise ValueError(
            f"a mixing of {mixing.shape[-1]} tokens was asked of values with {tokens.shape[-2]}: the text encoder pads "
            "prompts to another length than the tokenizer that the words were aligned with"
        )
    return mixing.to(tokens) @ tokens


def _map_bias(maps: Sequence[MapSpec], bias: torch.Tensor | None, key: Rows) -> torch.Tensor | None:
    """The bias of each map: a mask says which keys exist, so it follows the keys; shifts are added to it."""
    out = None
    if bias is not None:
        by_key = Rows(bias.transpose(-1, -2), tuple(range(bias.shape[0])))
        out = by_key.concatenated([spec.keys for spec in maps]).transpose(-1, -2)
    if any(any(spec.shifts) for spec in maps):
        tokens = key.tensor.shape[-2]
        shifts = torch.tensor(
            [[shift for shift in spec.shifts or (0.0,) * len(spec.keys) for _ in range(tokens)] for spec in maps],
            dtype=key.tensor.dtype,
        ).to(key.tensor.device)[:, None, None]  # [G, 1, 1, M]
        out = shifts if out is None else out + shifts
    return out
