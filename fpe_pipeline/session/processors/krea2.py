"""The attention processor that computes an edit's joint products in the blocks of Krea 2."""

from __future__ import annotations

from typing import Any

import torch

from ...edits.joint_products import JointPlan
from ..layers.dispatched import DispatchedAround
from ..layers.joint_computing import JointLayer
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import segment_projections
from ..layers.places import by_tables
from ..layers.text_order import counts_first

__all__ = ["EditKrea2Processor"]


class EditKrea2Processor(DispatchedAround):
    """Drop-in processor for the layers of Krea 2, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms and rotary embedding; several heads of queries share one of keys and values. Padding stands in the
    middle of a row's text: tokens that count are put first for the products, and back afterwards.
    """

    plain = ("Krea2AttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        order = self.order
        if order is None:
            out: torch.Tensor = self.inner(attn, hidden_states, attention_mask, image_rotary_emb)
            return out
        plan = order.plan
        assert isinstance(plan, JointPlan) and order.site.tokens is not None
        texts = hidden_states.shape[1] - order.site.tokens
        text, image = hidden_states[:, :texts], hidden_states[:, texts:]
        check_joint_input(order, image, text, None)  # the mask is of padding: text_lengths
        places = None if image_rotary_emb is None else (image_rotary_emb[0][texts:], image_rotary_emb[1][texts:])
        read = None if attention_mask is None else counts_first(attention_mask[:, 0, 0, :texts])
        layer = JointLayer(
            segment_projections(attn, plan, "image", image, by_tables(places)).beside("image", order.recorded),
            segment_projections(attn, plan, "text", _ordered(text, read)).beside("text", order.recorded),
            attn.head_dim**-0.5,
            order.backend,
            order.lengths(texts),
        )
        self.record = joint_record(plan, layer, attn.num_heads)
        rows, text_rows = joint_rows(order, plan, layer)
        assert text_rows is not None
        context = _ordered(merged_heads(text_rows), None if read is None else read.argsort(1))
        out = torch.cat([context, merged_heads(rows)], dim=1) * torch.sigmoid(attn.to_gate(hidden_states))
        return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]  # the second is dropout


def _ordered(tokens: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Tokens [B, T, C] at these places of their row [B, T]."""
    return tokens if places is None else tokens.take_along_dim(places.unsqueeze(-1), dim=1)
