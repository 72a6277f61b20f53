"""The attention processor that computes an edit's products in the blocks of LTX-Video."""

from __future__ import annotations

from typing import Any

import torch

from ..layers.computing import Rows, mask_bias, take
from ..layers.dispatched import DispatchedAround
from ..layers.instructions import Order
from ..layers.places import turned
from ..layers.row_attention import attended, check_rows, merged, of_heads, projected

__all__ = ["EditLTXProcessor"]


class EditLTXProcessor(DispatchedAround):
    """Drop-in processor for diffusers' ``LTXAttention``, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditAttnProcessor` does, of self-attention from queries
    and keys after their norms and rotary embedding, both over all heads at once. A text's padding takes no attention.
    """

    plain = ("LTXVideoAttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)
        return self._edited(order, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def _edited(
        self,
        order: Order,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """What a layer with an order becomes, behind its last projection."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        check_rows(order, hidden_states, [context])
        plan = order.row_plan
        # Fused projections are made and then not used by diffusers' processor.
        query, key, value = projected(attn, plan, plan.queries, hidden_states, context, fused=False)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            # Cosines and sines of every row's places [B, N, H·D], each angle twice.
            cosines, sines = (table[..., ::2] for table in image_rotary_emb)
            query, key = (
                turned(part, take(cosines, rows), take(sines, rows))
                for part, rows in ((query, plan.queries), (key, plan.keys))
            )
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a norm returns a wider type
        query, key, value = (of_heads(part, attn.heads) for part in (query, key, value))
        rows = (Rows(query, plan.queries), Rows(key, plan.keys), Rows(value, plan.values))
        bias = mask_bias(attention_mask, plan.rows, attn.heads, rows[1])
        out, self.record = attended(order, *rows, query.shape[-1] ** -0.5, bias)
        return attn.to_out[1](attn.to_out[0](merged(out).to(value.dtype)))  # to_out[1] is dropout
