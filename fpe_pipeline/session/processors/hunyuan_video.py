"""The attention processor that computes an edit's joint products in the blocks of HunyuanVideo and EasyAnimate."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ...edits.joint_products import JointPlan
from ..layers.dispatched import DispatchedAround
from ..layers.joint_computing import JointLayer
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import segment_projections
from ..layers.places import Turn, by_tables

__all__ = ["EditHunyuanVideoProcessor"]


class EditHunyuanVideoProcessor(DispatchedAround):
    """Drop-in processor for layers of HunyuanVideo and EasyAnimate, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, of the tokens of all frames and
    of the text, from queries and keys after their norms and rotary embedding. Padding of a row's text takes no
    attention.
    """

    plain: ClassVar[tuple[str, ...]] = (
        "HunyuanVideoAttnProcessor2_0",
        "HunyuanVideo15AttnProcessor2_0",
        "HunyuanImageAttnProcessor",
        "EasyAnimateAttnProcessor2_0",
    )

    def turn(self, places: Any) -> Turn | None:
        """The rotary embedding of image tokens, from what a layer receives of their places."""
        return by_tables(places)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        plan = order.plan
        assert isinstance(plan, JointPlan)
        check_joint_input(order, hidden_states, encoder_hidden_states, None)  # the mask is of padding: text_lengths
        assert encoder_hidden_states is not None
        layer = JointLayer(
            segment_projections(attn, plan, "image", hidden_states, self.turn(image_rotary_emb)).beside(
                "image", order.recorded
            ),
            segment_projections(attn, plan, "text", encoder_hidden_states, added=attn.add_q_proj is not None).beside(
                "text", order.recorded, ends=True
            ),
            (attn.inner_dim // attn.heads) ** -0.5,
            order.backend,
            order.lengths(encoder_hidden_states.shape[1]),
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        assert text_rows is not None
        out, context = merged_heads(rows), merged_heads(text_rows)
        if getattr(attn, "to_out", None) is not None:  # which single blocks have after their feed-forward part
            out = attn.to_out[1](attn.to_out[0](out))  # the second is dropout
        if getattr(attn, "to_add_out", None) is not None:
            context = attn.to_add_out(context)
        return out, context
