"""The attention processor that computes an edit's products in the blocks of Wan."""

from __future__ import annotations

from typing import Any

import torch

from fpe_kernels import shared_attention

from ..layers.computing import Rows
from ..layers.dispatched import DispatchedAround
from ..layers.places import turned
from ..layers.row_attention import attended, check_rows, merged, of_heads, projected

__all__ = ["EditWanProcessor"]

# Tokens of the text behind those of a picture, where a model (image to video) has both; diffusers' processor counts so.
_TEXTS = 512


class EditWanProcessor(DispatchedAround):
    """Drop-in processor for diffusers' ``WanAttention``, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditAttnProcessor` does, of self-attention from queries
    and keys after their norms over all heads and their rotary embedding. What a picture adds to the attention over the
    text (image to video) is added as in the unedited layer, each row with its own queries and its own picture.
    """

    plain = ("WanAttnProcessor", "SkyReelsV2AttnProcessor")

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)
        context, picture = hidden_states, None
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.add_k_proj is not None:
                pictures = context.shape[1] - _TEXTS
                picture, context = context[:, :pictures], context[:, pictures:]
        check_rows(order, hidden_states, [context])
        if attention_mask is not None:
            raise ValueError(f"{order.site.path} receives an attention mask, which layers of Wan are not known to have")
        plan = order.row_plan
        # Every row asks for its own picture, also where it takes another's map of the text.
        queries = plan.queries if picture is None else tuple(range(plan.rows))
        query, key, value = projected(attn, plan, queries, hidden_states, context, attn.fused_projections)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (of_heads(part, attn.heads) for part in (query, key, value))
        if rotary_emb is not None:
            # [1, N, 1, D], each angle twice.
            cosines, sines = (table[..., ::2].transpose(1, 2) for table in rotary_emb)
            query, key = (turned(part, cosines, sines) for part in (query, key))
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a norm returns a wider type
        rows = (Rows(query, queries), Rows(key, plan.keys), Rows(value, plan.values))
        out, self.record = attended(order, *rows, query.shape[-1] ** -0.5, None)
        if picture is not None:
            out = out + _of_picture(attn, query, picture, order.backend)
        return attn.to_out[1](attn.to_out[0](merged(out).to(value.dtype)))  # to_out[1] is dropout


def _of_picture(attn: Any, query: torch.Tensor, picture: torch.Tensor, backend: str) -> torch.Tensor:
    """What every row's picture [B, P, C] adds to its layer [B, H, N, D]."""
    if attn.fused_projections:
        key, value = attn.to_added_kv(picture).chunk(2, dim=-1)
    else:
        key, value = attn.add_k_proj(picture), attn.add_v_proj(picture)
    key, value = (of_heads(part, attn.heads).to(query.dtype) for part in (attn.norm_added_k(key), value))
    return shared_attention(query, key, value, tuple(range(query.shape[0])), backend=backend)
