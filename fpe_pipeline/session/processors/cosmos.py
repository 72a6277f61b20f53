"""The attention processor that computes an edit's products in the blocks of Cosmos Predict."""

from __future__ import annotations

from typing import Any

import torch

from fpe_kernels import shared_attention

from ..layers.computing import Rows
from ..layers.dispatched import DispatchedAround
from ..layers.places import by_tables
from ..layers.row_attention import attended, check_rows, merged, of_heads, projected

__all__ = ["EditCosmosProcessor"]


class EditCosmosProcessor(DispatchedAround):
    """Drop-in processor for the layers of Cosmos Predict, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditAttnProcessor` does, of self-attention from queries
    and keys after their norms and rotary embedding. What a picture adds to the attention over the text is added as in
    the unedited layer, each row with its own queries and its own picture.
    """

    plain = ("CosmosAttnProcessor2_0", "CosmosAttnProcessor2_5")

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
        attention_mask: Any = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        text, picture = (
            encoder_hidden_states if isinstance(encoder_hidden_states, tuple) else (encoder_hidden_states, None)
        )
        masks = attention_mask if isinstance(attention_mask, tuple) else (attention_mask,)
        if any(mask is not None for mask in masks):
            raise ValueError(f"{order.site.path} receives an attention mask, which pipelines of Cosmos do not pass")
        context = hidden_states if text is None else text
        check_rows(order, hidden_states, [context])
        plan = order.row_plan
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1))
            for part in projected(attn, plan, plan.queries, hidden_states, context, attn.fused_projections)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        turn = by_tables(image_rotary_emb, parts_at=-2)
        if turn is not None:
            query, key = turn(query, plan.queries), turn(key, plan.keys)
        query, key, value = (part.transpose(1, 2).to(value.dtype) for part in (query, key, value))
        rows = (Rows(query, plan.queries), Rows(key, plan.keys), Rows(value, plan.values))
        out, self.record = attended(order, *rows, query.shape[-1] ** -0.5, None)
        if picture is not None:
            out = out + _of_picture(attn, hidden_states, picture, order.backend)
        return attn.to_out[1](attn.to_out[0](merged(out).to(value.dtype)))  # to_out[1] is dropout


def _of_picture(attn: Any, hidden_states: torch.Tensor, picture: torch.Tensor, backend: str) -> torch.Tensor:
    """What every row's picture [B, P, C] adds to its layer [B, H, N, D]."""
    query, key, value = (
        of_heads(layer(tokens), attn.heads)
        for layer, tokens in ((attn.q_img, hidden_states), (attn.k_img, picture), (attn.v_img, picture))
    )
    query, key = (norm(part).to(value.dtype) for norm, part in ((attn.q_img_norm, query), (attn.k_img_norm, key)))
    return shared_attention(query, key, value, tuple(range(query.shape[0])), backend=backend)
