"""The attention processor that computes an edit's joint products in the blocks of Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from ..edits.joint_products import JointPlan
from .computing import Rows, take
from .dispatched import DispatchedAround
from .joint_computing import JointLayer, SegmentProjections
from .joint_processor import check_joint_input, joint_record, joint_rows, merged_heads

__all__ = ["EditQwenProcessor"]


class EditQwenProcessor(DispatchedAround):
    """Drop-in processor for the layers of Qwen-Image, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms and rotary embedding, each stream's own. Padding of a row's text takes no attention.
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
        plan = order.plan
        assert isinstance(plan, JointPlan)
        check_joint_input(order, hidden_states, encoder_hidden_states, attention_mask)
        assert encoder_hidden_states is not None
        places = (None, None) if image_rotary_emb is None else image_rotary_emb
        layer = JointLayer(
            _project(attn, plan, "image", hidden_states, places[0]).beside("image", order.recorded),
            _project(attn, plan, "text", encoder_hidden_states, places[1]),
            (attn.inner_dim // attn.heads) ** -0.5,
            order.backend,
            order.text_lengths,
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        assert text_rows is not None
        out = attn.to_out[0](merged_heads(rows))
        if len(attn.to_out) > 1:
            out = attn.to_out[1](out)  # dropout
        return out, attn.to_add_out(merged_heads(text_rows))


def _project(attn: Any, plan: JointPlan, segment: Any, tokens: torch.Tensor, places: Any) -> SegmentProjections:
    """The rows of a segment that the plan uses, projected, normed and turned: [rows, H, tokens, D]."""
    used = [plan.used(part, segment) for part in ("query", "key", "value")]
    names = ("to_q", "to_k", "to_v") if segment == "image" else ("add_q_proj", "add_k_proj", "add_v_proj")
    split = [getattr(attn, name)(take(tokens, rows)) for name, rows in zip(names, used, strict=True)]
    query, key, value = (part.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for part in split)
    norm_q, norm_k = (attn.norm_q, attn.norm_k) if segment == "image" else (attn.norm_added_q, attn.norm_added_k)
    query, key = (query if norm_q is None else norm_q(query)), (key if norm_k is None else norm_k(key))
    if places is not None:
        query, key = (_turned(part, places) for part in (query, key))
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a norm returns a wider type
    parts = zip((query, key, value), used, strict=True)
    return SegmentProjections(*(Rows(part.transpose(1, 2), rows) for part, rows in parts))


def _turned(part: torch.Tensor, places: Any) -> torch.Tensor:
    """Queries or keys [rows, N, H, D] turned by their places; of no rows where all are known from a recording."""
    return apply_rotary_emb_qwen(part, places, use_real=False) if part.shape[0] else part
