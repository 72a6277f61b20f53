"""The attention processor that computes an edit's products in the blocks of Kandinsky 5."""

from __future__ import annotations

from typing import Any

import torch

from ..layers.computing import Rows
from ..layers.dispatched import DispatchedAround
from ..layers.places import turned
from ..layers.row_attention import attended, check_rows, merged, projected

__all__ = ["EditKandinsky5Processor"]


class EditKandinsky5Processor(DispatchedAround):
    """Drop-in processor for diffusers' ``Kandinsky5Attention``, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditAttnProcessor` does, of self-attention from queries
    and keys after their norms and rotary embedding.
    """

    plain = ("Kandinsky5AttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        sparse_params: Any = None,
    ) -> torch.Tensor:
        order = self.order
        if order is None:
            inner: torch.Tensor = self.inner(attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params)
            return inner
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        check_rows(order, hidden_states, [context])
        plan = order.row_plan
        names = "to_query", "to_key", "to_value"
        query, key, value = (
            part.unflatten(-1, (attn.num_heads, -1))
            for part in projected(attn, plan, plan.queries, hidden_states, context, fused=False, names=names)
        )
        query, key = attn.query_norm(query.float()).type_as(query), attn.key_norm(key.float()).type_as(key)
        if rotary_emb is not None:
            query, key = (_turned(part, rotary_emb) for part in (query, key))
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        rows = (Rows(query, plan.queries), Rows(key, plan.keys), Rows(value, plan.values))
        out, self.record = attended(order, *rows, query.shape[-1] ** -0.5, None)
        return attn.out_layer(merged(out).to(value.dtype))  # type: ignore[no-any-return]


def _turned(part: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Queries or keys [rows, N, H, D], rounded to bfloat16 once they are turned, as the model does in every dtype.

    Args:
        places: [B, N, 1, D / 2, 2, 2], for each pair of numbers the matrix of its turn; all rows stand alike.
    """
    cosines, sines = places[:1, ..., 0, 0], places[:1, ..., 1, 0]
    wide = torch.promote_types(places.dtype, torch.float32)
    return turned(part.float().to(wide), cosines, sines).to(torch.bfloat16).to(part.dtype)
