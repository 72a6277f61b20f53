"""The attention processor that computes an edit's products in the blocks of Allegro."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb_allegro

from ..layers.around import AroundPlain
from ..layers.computing import Rows, mask_bias
from ..layers.row_attention import attended, check_rows, merged, of_heads, projected

__all__ = ["EditAllegroProcessor"]


class EditAllegroProcessor(AroundPlain):
    """Drop-in processor for the layers of Allegro, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditAttnProcessor` does, of self-attention from queries
    and keys after their rotary embedding. A text's padding takes no attention.
    """

    plain = ("AllegroAttnProcessor2_0",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        image_rotary_emb: tuple[Any, Any] | None = None,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb, image_rotary_emb)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        check_rows(order, hidden_states, [context])
        plan = order.row_plan
        query, key, value = (
            of_heads(part, attn.heads)
            for part in projected(attn, plan, plan.queries, hidden_states, context, fused=False)
        )
        if image_rotary_emb is not None and context is hidden_states:
            query, key = (apply_rotary_emb_allegro(part, *image_rotary_emb) for part in (query, key))
        rows = (Rows(query, plan.queries), Rows(key, plan.keys), Rows(value, plan.values))
        bias = mask_bias(attention_mask, plan.rows, attn.heads, rows[1])
        out, self.record = attended(order, *rows, query.shape[-1] ** -0.5, bias)
        return attn.to_out[1](attn.to_out[0](merged(out).to(value.dtype)))  # to_out[1] is dropout
