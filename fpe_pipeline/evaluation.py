"""Computing a plan of products with ``shared_attention``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fpe_kernels import shared_attention

from .products import AttentionCall, ProductPlan

__all__ = ["Rows", "evaluate", "mask_bias", "take"]


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
    sums: dict[int, torch.Tensor] = {}
    for call in plan.calls:
        result = shared_attention(
            query.take([row for row, _ in call.maps]),
            key.concatenated([keys for _, keys in call.maps]),
            _values(call, value),
            call.map_index,
            scale=scale,
            bias=_map_bias(call, bias),
            backend=backend,
        )  # [len(products), H, N, E]
        if plan.is_plain:
            return result
        for row, product, term in zip(call.rows, call.products, result, strict=True):
            term = _weighted(term, product.weight)
            sums[row] = sums[row] + term if row in sums else term
    return torch.stack([sums[row] for row in range(plan.rows)])


def _weighted(term: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    if isinstance(weight, torch.Tensor) and weight.ndim:
        weight = weight[:, None]  # [N, 1], over heads and channels
    return term * (weight.to(term) if isinstance(weight, torch.Tensor) else weight)


def _values(call: AttentionCall, value: Rows) -> torch.Tensor:
    values = value.concatenated([product.values for product in call.products])
    if all(product.mixing is None for product in call.products):
        return values
    return torch.stack(
        [
            tokens if product.mixing is None else product.mixing.to(tokens) @ tokens
            for product, tokens in zip(call.products, values, strict=True)
        ]
    )


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


def _map_bias(call: AttentionCall, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The bias of each map. A mask says which keys exist, so it follows the keys."""
    if bias is None:
        return None
    by_key = Rows(bias.transpose(-1, -2), tuple(range(bias.shape[0])))
    return by_key.concatenated([keys for _, keys in call.maps]).transpose(-1, -2)
