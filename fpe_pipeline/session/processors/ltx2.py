"""The attention processor that computes an edit's products in the blocks of LTX-2."""

from __future__ import annotations

from typing import Any

import torch

from ..layers.computing import Rows, mask_bias, take
from ..layers.dispatched import DispatchedAround
from ..layers.instructions import Order
from ..layers.places import turned
from ..layers.record import LayerRecord
from ..layers.row_attention import attended, check_rows, merged, of_heads, projected

__all__ = ["EditLTX2Processor"]


class EditLTX2Processor(DispatchedAround):
    """Drop-in processor for diffusers' ``LTX2Attention``, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditLTXProcessor` does; a gate weighs what each head
    becomes, by the tokens of the row itself. Where a layer's attention is perturbed, its values take its place, and
    there is no map to give to another row.
    """

    plain = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        key_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        perturbation_mask: torch.Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> Any:
        order = self.order
        perturbed = perturbation_mask is not None
        if order is None or perturbed:
            if order is not None:
                self.record = LayerRecord(skipped="perturbed guidance replaces the layer's attention by its values")
            given = (attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb)
            return self.inner(*given, perturbation_mask, all_perturbed) if perturbed else self.inner(*given)
        return self._edited(order, attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb)

    def _edited(
        self,
        order: Order,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> Any:
        """What a layer with an order becomes, behind its last projection."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        check_rows(order, hidden_states, [context])
        plan = order.row_plan
        query, key, value = projected(attn, plan, plan.queries, hidden_states, context, fused=False)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary is not None:
            query, key = (_turned(part, rotary, rows, attn) for part, rows in ((query, plan.queries), (key, plan.keys)))
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a norm returns a wider type
        query, key, value = (of_heads(part, attn.heads) for part in (query, key, value))
        rows = (Rows(query, plan.queries), Rows(key, plan.keys), Rows(value, plan.values))
        bias = mask_bias(attention_mask, plan.rows, attn.heads, rows[1])
        out, self.record = attended(order, *rows, query.shape[-1] ** -0.5, bias)
        if attn.to_gate_logits is not None:
            out = out * (2 * attn.to_gate_logits(hidden_states).sigmoid()).transpose(1, 2).unsqueeze(-1)
        return attn.to_out[1](attn.to_out[0](merged(out).to(value.dtype)))  # to_out[1] is dropout


def _turned(
    part: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], rows: tuple[int, ...], attn: Any
) -> torch.Tensor:
    """Queries or keys [rows, N, H·D] by cosines and sines of every row's places.

    The tables are [B, N, H·D], each angle twice, or [B, H, N, D / 2], for pairs that stand in the halves of a head.
    """
    if attn.rope_type == "interleaved":
        cosines, sines = (take(table[..., ::2], rows) for table in rotary)
        return turned(part, cosines, sines)
    cosines, sines = (take(table, rows).transpose(1, 2) for table in rotary)
    first, second = part.unflatten(-1, (attn.heads, 2, -1)).unbind(-2)  # [rows, N, H, D / 2]
    pairs = first * cosines - second * sines, first * sines + second * cosines
    return torch.stack(pairs, dim=-2).flatten(-3).to(part.dtype)
