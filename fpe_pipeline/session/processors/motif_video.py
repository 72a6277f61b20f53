"""The attention processor that computes an edit's joint products in the blocks of Motif-Video."""

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

__all__ = ["EditMotifVideoProcessor"]


class EditMotifVideoProcessor(DispatchedAround):
    """Drop-in processor for the layers of Motif-Video, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, of the tokens of all frames and
    of the text, from queries and keys after their norms and rotary embedding. Padding of a row's text takes no
    attention, on either side of it: tokens that count are put first for the products, and back afterwards.
    """

    plain = ("MotifVideoAttnProcessor2_0",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        plan = order.plan
        assert isinstance(plan, JointPlan)
        check_joint_input(order, hidden_states, encoder_hidden_states, None)  # the mask is of padding: text_lengths
        assert encoder_hidden_states is not None
        images = hidden_states.shape[1]
        read = None if attention_mask is None else counts_first(attention_mask[:, 0, 0, images:])
        text = _ordered(encoder_hidden_states, read)
        layer = JointLayer(
            segment_projections(attn, plan, "image", hidden_states, by_tables(image_rotary_emb)),
            segment_projections(attn, plan, "text", text, added=attn.add_q_proj is not None),
            attn.head_dim**-0.5,
            order.backend,
            order.text_lengths,
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        assert text_rows is not None
        out = merged_heads(rows)
        context = _ordered(merged_heads(text_rows), None if read is None else read.argsort(1))
        if attn.to_out is not None:  # which single blocks have after their feed-forward part
            out = attn.to_out[1](attn.to_out[0](out))  # the second is dropout
        return out, context if attn.to_add_out is None else attn.to_add_out(context)


def _ordered(tokens: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Tokens [B, T, C] at these places of their row [B, T]."""
    return tokens if places is None else tokens.take_along_dim(places.unsqueeze(-1), dim=1)
