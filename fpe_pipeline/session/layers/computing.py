"""A plan of products in terms of ``fpe_kernels``: shared attention for the output, maps as operators on request."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fpe_kernels import AttentionMap, LinearMap, shared_attention

from ...edits.products import AttentionCall, MapSpec, Product, ProductPlan

__all__ = ["Projections", "Rows", "evaluate", "mask_bias", "row_maps", "take"]

# Added to variances where queries and keys are normalised, as in instance normalisation.
_EPSILON = 1e-5


@dataclass(frozen=True)
class Rows:
    """Some rows of the batch, by their number in the whole batch, and rows beside it that a recording knows."""

    tensor: torch.Tensor  # [len(rows), H, N, E]
    rows: tuple[int, ...]
    recorded: Mapping[int, torch.Tensor] = field(default_factory=dict)  # [1, H, N, E] each

    def take(self, rows: Sequence[int]) -> torch.Tensor:
        if not any(row in self.recorded for row in rows):
            return take(self.tensor, [self.rows.index(row) for row in rows])
        pieces = [self.recorded[row] if row in self.recorded else self._own(row) for row in rows]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _own(self, row: int) -> torch.Tensor:
        index = self.rows.index(row)
        return self.tensor[index : index + 1]

    def within(self, tokens: slice) -> Rows:
        """These tokens of the same rows."""
        recorded = {row: tensor[:, :, tokens] for row, tensor in self.recorded.items()}
        return Rows(self.tensor[:, :, tokens], self.rows, recorded)

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


@dataclass(frozen=True)
class Projections:
    """A layer's projected rows, and what its scores are made with.

    Args:
        query, key, value: at least the rows that a plan names, as [rows, H, N | M, D | E].
        scale: what scores are multiplied with.
        bias: what is added to them, for every row of the batch: [plan.rows, 1 | H, 1 | N, M].
        backend: of ``shared_attention``.
        logsumexp: of the recorded rows whose maps a plan uses [1, H, N].
    """

    query: Rows
    key: Rows
    value: Rows
    scale: float
    bias: torch.Tensor | None = None
    backend: str = "auto"
    logsumexp: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def recorded(self, rows: Sequence[int]) -> AttentionMap:
        """The own maps of recorded rows, one after the other."""
        return AttentionMap(
            self.query.take(rows),
            self.key.take(rows),
            scale=self.scale,
            backend=self.backend,
            logsumexp=torch.cat([self.logsumexp[row] for row in rows]),
        )

    def scores(self, maps: Sequence[MapSpec]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Queries [G, H, N, D], keys [G, H, M, D] and options of ``fpe_kernels`` for some maps of one scale."""
        options = {
            "scale": self.scale * maps[0].scale,
            "bias": _map_bias(maps, self.bias, self.key),
            "backend": self.backend,
        }
        return _queries(maps, self.query), _keys(maps, self.key), options


def evaluate(
    plan: ProductPlan, layer: Projections, columns: Mapping[int, torch.Tensor] | None = None
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The plan's products, summed by row, and beside them products of the rows' edited maps with columns of one's own.

    A row's output is linear in its values, so the columns are carried through the same products as more values:
    scores and softmax are computed once for both.

    Args:
        columns: for some rows, what their edited map is to be multiplied with: [M', C].

    Returns:
        The output [plan.rows, H, N, E], and for each row of ``columns`` its edited map times them: [H, N, C].
    """
    columns = columns or {}
    heat = {row: _heat(layer.recorded([row]), given) for row, given in columns.items() if row >= plan.rows}
    columns = {row: given for row, given in columns.items() if row < plan.rows}
    dim = layer.value.tensor.shape[-1]
    wide = max([0, *(given.shape[-1] for given in columns.values())])
    results = []
    for call in plan.calls:
        values = _values(call, layer.value)
        if wide:
            values = torch.cat([values, _column_values(call, columns, wide, values)], dim=-1)
        if call.recorded:
            known = layer.recorded([spec.query for spec in call.maps])
            result = known.gathered_product(values, call.map_index, _weights(call.products, known.query))
        else:
            query, key, options = layer.scores(call.maps)
            result = shared_attention(
                query, key, values, call.map_index, weight=_weights(call.products, query), **options
            )
        results.append(result)  # [len(products), H, N, E + wide]
    rows = [row for call in plan.calls for row in call.rows]
    if plan.is_plain:
        joined = results[0] if len(results) == 1 else torch.cat(results)
        totals = take(joined, [rows.index(row) for row in range(plan.rows)])
    else:
        sums: dict[int, torch.Tensor] = {}
        for row, term in zip(rows, itertools.chain(*results), strict=True):
            sums[row] = sums[row] + term if row in sums else term
        totals = torch.stack([sums[row] for row in range(plan.rows)])
    return totals[..., :dim], heat | {row: totals[row, ..., dim : dim + c.shape[-1]] for row, c in columns.items()}


def row_maps(plan: ProductPlan, rows: Sequence[int], layer: Projections) -> dict[int, LinearMap]:
    """The edited maps of some rows of the plan, as operators [1, H, N, M']; of recorded rows, their own.

    Detached, nothing computed yet.
    """
    maps: dict[MapSpec, AttentionMap] = {}
    terms: dict[int, list[LinearMap]] = {row: [] for row in rows}
    for row in [row for row in rows if row >= plan.rows]:
        terms[row].append(layer.recorded([row]))
    for call in plan.calls:
        for row, product in zip(call.rows, call.products, strict=True):
            if row in terms:
                if product.map not in maps:
                    query, key, options = layer.scores([product.map])
                    maps[product.map] = AttentionMap(query.detach(), key.detach(), **options)
                terms[row].append(_edited(maps[product.map], product))
    return {row: functools.reduce(operator.add, summands) for row, summands in terms.items()}


def _heat(attention: AttentionMap, columns: torch.Tensor) -> torch.Tensor:
    """One map times columns [M, C]: [H, N, C]."""
    _, heads, _, tokens = attention.shape
    if columns.shape[-2] != tokens:
        raise ValueError(f"columns over {columns.shape[-2]} tokens were asked of a recorded map over {tokens} keys")
    return (attention @ columns.to(attention.query).expand(1, heads, *columns.shape))[0]


def _edited(attention: AttentionMap, product: Product) -> LinearMap:
    mixed = attention if product.mixing is None else attention.mix(product.mixing.to(attention.key))
    weights = _weights([product], attention.query)
    return mixed if weights is None else mixed.scale_rows(weights)


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


def _weights(products: Sequence[Product], query: torch.Tensor) -> torch.Tensor | None:
    """The weights of some products of maps of queries [G, H, N, D]: [products, 1 | H, 1 | N], in the dtype of
    statistics; None where all are one.
    """
    weights = [product.weight for product in products]
    if all(not isinstance(weight, torch.Tensor) and weight == 1.0 for weight in weights):
        return None
    each = [_weight(weight, query) for weight in weights]
    shape = torch.broadcast_shapes(*(weight.shape for weight in each))
    return torch.stack([weight.expand(shape) for weight in each])


def _weight(weight: float | torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[1 | H, 1 | N], at the precision of the products' statistics."""
    dtype, (heads, tokens) = torch.promote_types(query.dtype, torch.float32), query.shape[1:3]
    if not isinstance(weight, torch.Tensor):
        return torch.full((1, 1), weight, dtype=dtype, device=query.device)  # a fill: a copy would wait for the device
    shape = (1,) * (2 - weight.ndim) + tuple(weight.shape)
    if weight.ndim > 2 or shape[0] not in (1, heads) or shape[1] not in (1, tokens):
        raise ValueError(
            f"expected weights of a layer of {heads} heads and {tokens} tokens as [{tokens}], [{heads}, 1] or "
            f"[{heads}, {tokens}], got {list(weight.shape)}: make them for the site that the edit is asked about"
        )
    return weight.to(query.device, dtype).reshape(shape)


def _queries(maps: Sequence[MapSpec], query: Rows) -> torch.Tensor:
    """The query of each map: [len(maps), H, N, D]."""
    styles = [spec.style if "query" in spec.styled else None for spec in maps]
    if all(style in (None, spec.query) for spec, style in zip(maps, styles, strict=True)):
        return query.take([spec.query for spec in maps])
    return torch.stack([_styled(query, spec.query, style) for spec, style in zip(maps, styles, strict=True)])


def _keys(maps: Sequence[MapSpec], key: Rows) -> torch.Tensor:
    """The keys of each map: [len(maps), H, M, D]."""
    if all((spec.style is None or "key" not in spec.styled) and not spec.scales for spec in maps):
        return key.concatenated([spec.keys for spec in maps])
    return torch.stack([torch.cat(list(_keys_of(spec, key)), dim=-2) for spec in maps])


def _keys_of(spec: MapSpec, key: Rows) -> Iterator[torch.Tensor]:
    """The keys of each of a map's rows [H, M, D]."""
    style = spec.style if "key" in spec.styled else None
    for row, scale in zip(spec.keys, spec.scales or (1.0,) * len(spec.keys), strict=True):
        styled = _styled(key, row, style)
        yield styled if scale == 1.0 else scale * styled


def _styled(tensor: Rows, row: int, style: int | None) -> torch.Tensor:
    """A row [H, N, D] with the mean and standard deviation over tokens of another (adaptive instance normalisation)."""
    given = tensor.take([row])[0]
    if style is None or style == row:
        return given
    like = tensor.take([style])[0]
    # In half precision, a variance of large queries overflows.
    wide = torch.promote_types(given.dtype, torch.float32)
    unbiased = int(given.shape[-2] > 1)  # a single token has no deviation
    (variance, mean), (goal_variance, goal_mean) = (
        torch.var_mean(x.to(wide), dim=-2, correction=unbiased, keepdim=True) for x in (given, like)
    )
    scale = ((goal_variance + _EPSILON) / (variance + _EPSILON)).sqrt()
    return ((given.to(wide) - mean) * scale + goal_mean).to(given.dtype)


def _values(call: AttentionCall, value: Rows) -> torch.Tensor:
    if all(product.value_style is None for product in call.products):
        values = value.concatenated([product.values for product in call.products])
    else:
        values = torch.stack(
            [
                torch.cat([_styled(value, row, product.value_style) for row in product.values], dim=-2)
                for product in call.products
            ]
        )
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
        # By fills: a list's numbers would be copied to the device at every call.
        tokens = (key.tensor.shape[-2],)
        shifts = torch.stack(
            [
                torch.cat([key.tensor.new_full(tokens, shift) for shift in spec.shifts or (0.0,) * len(spec.keys)])
                for spec in maps
            ]
        )[:, None, None]  # [G, 1, 1, M]
        out = shifts if out is None else out + shifts
    return out
