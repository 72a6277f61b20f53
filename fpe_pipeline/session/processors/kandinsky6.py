"""The attention processor that computes an edit's products in the blocks of Kandinsky 6."""

from __future__ import annotations

from typing import Any

import torch

from ..layers.computing import Rows, mask_bias
from ..layers.dispatched import DispatchedAround
from ..layers.places import by_matrices
from ..layers.row_attention import attended, check_rows, merged, projected

__all__ = ["EditKandinsky6Processor"]


class EditKandinsky6Processor(DispatchedAround):
    """Drop-in processor for diffusers' ``Kandinsky6Attention``, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditAttnProcessor` does, of self-attention from queries
    and keys after their norms and rotary embedding. A mask says which text tokens are no padding.
    """

    plain = ("Kandinsky6AttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        rotary_emb_kv: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        order = self.order
        if order is None:
            given = (attn, hidden_states, encoder_hidden_states, rotary_emb, rotary_emb_kv, attn_mask)
            inner: torch.Tensor = self.inner(*given)
            return inner
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        check_rows(order, hidden_states, [context])
        plan = order.row_plan
        names = "to_query", "to_key", "to_value"
        query, key, value = (
            part.unflatten(-1, (attn.num_heads, -1))
            for part in projected(attn, plan, plan.queries, hidden_states, context, fused=False, names=names)
        )
        query, key = attn.query_norm(query).to(value.dtype), attn.key_norm(key).to(value.dtype)
        if rotary_emb is not None:  # [N, 1, D / 2, 2, 2], of tokens that ask and are asked alike
            places = rotary_emb.squeeze(1)
            turn = by_matrices(places.to(torch.promote_types(places.dtype, torch.float32)))
            query, key = turn(query, plan.queries), turn(key, plan.keys)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        rows = (Rows(query, plan.queries), Rows(key, plan.keys), Rows(value, plan.values))
        bias = mask_bias(attn_mask, plan.rows, attn.num_heads, rows[1])
        out, self.record = attended(order, *rows, query.shape[-1] ** -0.5, bias)
        return attn.out_layer(merged(out).to(value.dtype))  # type: ignore[no-any-return]
