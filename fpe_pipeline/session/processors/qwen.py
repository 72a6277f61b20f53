"""The attention processor that computes an edit's joint products in the blocks of Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from ...edits.joint_products import JointPlan
from ..layers.dispatched import DispatchedAround
from ..layers.joint_computing import JointLayer
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import segment_projections
from ..layers.places import Turn

__all__ = ["EditQwenProcessor", "qwen_turn"]


class EditQwenProcessor(DispatchedAround):
    """Drop-in processor for the layers of Qwen-Image, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms and rotary embedding, each stream's own. Padding of a row's text takes no attention. Tokens of reference
    pictures (Qwen-Image-Edit) are a row's own as its text is, before which they stand.
    """

    plain = ("QwenDoubleStreamAttnProcessor2_0",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(
                attn,
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                attention_mask,
                image_rotary_emb,
            )
        plan, images, references = order.plan, order.site.tokens, order.references
        assert isinstance(plan, JointPlan) and images is not None
        image, reference = hidden_states[:, :images], hidden_states[:, images:]
        check_joint_input(
            order, hidden_states if reference.shape[1] != references else image, encoder_hidden_states, attention_mask
        )
        assert encoder_hidden_states is not None
        turned, text_turned = (None, None) if image_rotary_emb is None else image_rotary_emb
        own = segment_projections(attn, plan, "text", encoder_hidden_states, qwen_turn(text_turned), added=True)
        if references:
            shown = None if turned is None else turned[images:]
            own = segment_projections(attn, plan, "text", reference, qwen_turn(shown)).followed_by(own)
        turned = None if turned is None else turned[:images]
        layer = JointLayer(
            segment_projections(attn, plan, "image", image, qwen_turn(turned)).beside("image", order.recorded),
            own.beside("text", order.recorded, ends=True),
            (attn.inner_dim // attn.heads) ** -0.5,
            order.backend,
            order.lengths(encoder_hidden_states.shape[1]),
            references,
            references_first=True,
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        assert text_rows is not None
        out, context = merged_heads(rows), merged_heads(text_rows)
        out, context = torch.cat([out, context[:, :references]], dim=1), context[:, references:]
        out = attn.to_out[0](out)
        if len(attn.to_out) > 1:
            out = attn.to_out[1](out)  # dropout
        return out, attn.to_add_out(context)


def qwen_turn(places: torch.Tensor | None) -> Turn | None:
    """The rotary embedding of tokens at these places, complex [tokens, D / 2], that all rows share."""
    return None if places is None else lambda part, rows: apply_rotary_emb_qwen(part, places, use_real=False)
