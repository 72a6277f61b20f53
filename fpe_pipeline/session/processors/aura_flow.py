"""The attention processor that computes an edit's joint products in the blocks of AuraFlow."""

from __future__ import annotations

from typing import Any

import torch

from ...edits.joint_products import JointPlan
from ..layers.around import AroundPlain
from ..layers.joint_computing import JointLayer
from ..layers.joint_processor import check_joint_input, is_fused, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import segment_projections

__all__ = ["EditAuraFlowProcessor"]


class EditAuraFlowProcessor(AroundPlain):
    """Drop-in processor for the layers of AuraFlow, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms. A single block's tokens are one tensor, text first.
    """

    plain = ("AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0")

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        plan = order.plan
        assert isinstance(plan, JointPlan) and order.site.tokens is not None
        is_single, text, image = encoder_hidden_states is None, encoder_hidden_states, hidden_states
        if text is None:
            texts = hidden_states.shape[1] - order.site.tokens
            text, image = hidden_states[:, :texts], hidden_states[:, texts:]
        check_joint_input(order, image, text, None)
        fused = is_fused(self.inner)
        own = segment_projections(attn, plan, "text", text, added=not is_single, fused=fused)
        layer = JointLayer(
            segment_projections(attn, plan, "image", image, fused=fused).beside("image", order.recorded),
            own.beside("text", order.recorded),
            attn.scale,
            order.backend,
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        assert text_rows is not None
        out, context = merged_heads(rows), merged_heads(text_rows)
        if is_single:
            out = torch.cat([context, out], dim=1)
        out = attn.to_out[1](attn.to_out[0](out))  # the second is dropout
        return out if is_single else (out, attn.to_add_out(context))
