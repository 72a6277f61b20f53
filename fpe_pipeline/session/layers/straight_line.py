"""Layers that are the common case, computed in a straight line: a replaced self-attention layer, and an unedited one.

Most edited layers are one call of shared attention: every row of the batch is a map of some row times the values of
some row, nothing is weighed, mixed or added, and nobody reads along. A short layer takes less time on a GPU than Python
takes to arrange the general case (:mod:`.computing`), which computes the same to the bit. So what follows from the plan
alone (which rows, as slices) is worked out once for the plan, and a call is the tensor operations and nothing else.

The same holds for the layers beside them, which diffusers computes: most are projections around attention, and the
questions that its processor asks of every layer take longer than that. They are the same operations, but for a division
by 1 that is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from fpe_kernels import shared_attention

from ...edits.products import ProductPlan
from .record import LayerRecord

__all__ = ["StraightLine", "is_straight", "straight_line", "unedited_layer"]


def straight_line(plan: ProductPlan, tokens: int | None, backend: str) -> StraightLine | None:
    """How to compute a plan's self-attention of so many tokens in one call; None where it takes more than that."""
    return None if plan.only_call is None or tokens is None else StraightLine(plan, tokens, backend)


class StraightLine:
    """A self-attention layer's forward, for a plan that is one plain call.

    Args:
        plan: whose ``only_call`` is not None.
        tokens: of the layer.
        backend: of ``shared_attention``.
    """

    def __init__(self, plan: ProductPlan, tokens: int, backend: str) -> None:
        call = plan.only_call
        assert call is not None
        self._rows, self._tokens, self._backend = plan.rows, tokens, backend
        named = {
            "query": (plan.queries, [spec.query for spec in call.maps]),
            "key": (plan.keys, [spec.keys[0] for spec in call.maps]),
            "value": (plan.values, [product.values[0] for product in call.products]),
        }
        self._map_index = call.map_index
        # The rows to project, and then, by their places among those, each map's and each product's.
        self._queries, self._keys, self._values = (runs(rows, plan.rows) for rows, _ in named.values())
        self._query_order, self._key_order, self._value_order = (
            runs([rows.index(row) for row in wanted], len(rows)) for rows, wanted in named.values()
        )
        self._is_own = self._queries == self._keys
        self._projected = len(plan.queries), len(plan.keys), len(plan.values)

    def serves(self, attn: Any, hidden_states: torch.Tensor, context: Any, mask: Any) -> bool:
        """Whether the layer is nothing but projections around attention over its own tokens.

        Args:
            attn: the diffusers ``Attention``.
            hidden_states: [B, N, C].
            context, mask: what else it receives, which has to be None.
        """
        return (
            context is None
            and is_straight(attn, hidden_states, mask)
            and hidden_states.shape[0] == self._rows
            and hidden_states.shape[1] == self._tokens
        )

    def __call__(self, attn: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, LayerRecord]:
        """The layer's output [B, N, C], and what was done."""
        tokens, heads, (queries, keys, values) = self._tokens, attn.heads, self._projected
        asking = _taken(hidden_states, self._queries)
        query = attn.to_q(asking)
        key = attn.to_k(asking if self._is_own else _taken(hidden_states, self._keys))
        value = attn.to_v(_taken(hidden_states, self._values))
        dtype, width = value.dtype, value.shape[2]
        if query.dtype is not dtype or key.dtype is not dtype:
            query, key = query.to(dtype), key.to(dtype)
        out = shared_attention(
            _taken(query.view(queries, tokens, heads, -1).transpose(1, 2), self._query_order),
            _taken(key.view(keys, tokens, heads, -1).transpose(1, 2), self._key_order),
            _taken(value.view(values, tokens, heads, -1).transpose(1, 2), self._value_order),
            self._map_index,
            scale=attn.scale,
            backend=self._backend,
        )
        itemsize = dtype.itemsize
        held = tokens * itemsize * (queries * query.shape[2] + keys * key.shape[2] + values * width)
        out = _finished(attn, out.transpose(1, 2).reshape(self._rows, tokens, width), hidden_states)
        return out, LayerRecord("", itemsize, held, self._rows * heads * tokens * tokens * itemsize)


def is_straight(attn: Any, hidden_states: torch.Tensor, mask: Any) -> bool:
    """Whether a layer is nothing but projections around attention.

    Args:
        attn: the diffusers ``Attention``.
        hidden_states: [B, N, C].
        mask: what it receives as one, which has to be None.
    """
    return (
        mask is None
        and hidden_states.ndim == 3
        and attn.spatial_norm is None
        and attn.group_norm is None
        and attn.norm_cross is None
        and attn.norm_q is None
        and attn.norm_k is None
    )


def unedited_layer(attn: Any, hidden_states: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    """A layer that :func:`is_straight`, as ``AttnProcessor2_0`` computes it, to the bit.

    Args:
        attn: the diffusers ``Attention``.
        hidden_states: [B, N, C].
        context: [B, M, C'] that it attends to; its own tokens where None.
    """
    seen = hidden_states if context is None else context
    query, key, value = attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen)
    batch, heads, width = seen.shape[0], attn.heads, key.shape[-1]
    split = (batch, -1, heads, width // heads)
    out = functional.scaled_dot_product_attention(
        query.view(split).transpose(1, 2), key.view(split).transpose(1, 2), value.view(split).transpose(1, 2)
    )
    return _finished(attn, out.transpose(1, 2).reshape(batch, -1, width).to(query.dtype), hidden_states)


def _finished(attn: Any, out: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The layer's output from its attention's."""
    project, dropout, *_ = attn.to_out  # of which diffusers calls no more
    out = dropout(project(out))
    if attn.residual_connection:
        out = out + residual
    return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor


def runs(rows: Sequence[int], batch: int) -> tuple[slice, ...]:
    """``rows`` of a batch as slices; () for all of them in order."""
    if list(rows) == list(range(batch)):
        return ()
    starts = [place for place, row in enumerate(rows) if place == 0 or row != rows[place - 1] + 1]
    stops = [*starts[1:], len(rows)]
    return tuple(slice(rows[start], rows[start] + stop - start) for start, stop in zip(starts, stops, strict=True))


def _taken(tensor: torch.Tensor, slices: tuple[slice, ...]) -> torch.Tensor:
    if not slices:
        return tensor
    return tensor[slices[0]] if len(slices) == 1 else torch.cat([tensor[piece] for piece in slices])
