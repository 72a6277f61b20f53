"""The attention processor that computes an edit's joint products in the blocks of HunyuanVideo."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb

from ..edits.joint_products import JointPlan
from .computing import Rows, take
from .dispatched import DispatchedAround
from .joint_computing import JointLayer, SegmentProjections
from .joint_processor import check_joint_input, joint_record, joint_rows, merged_heads

__all__ = ["EditHunyuanVideoProcessor"]


class EditHunyuanVideoProcessor(DispatchedAround):
    """Drop-in processor for the layers of HunyuanVideo, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, of the tokens of all frames and
    of the text, from queries and keys after their norms and rotary embedding. Padding of a row's text takes no
    attention.
    """

    plain = ("HunyuanVideoAttnProcessor2_0",)

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
        has_streams = attn.add_q_proj is not None
        layer = JointLayer(
            _projected(attn, plan, "image", hidden_states, image_rotary_emb, added=False),
            _projected(attn, plan, "text", encoder_hidden_states, None, added=has_streams),
            attn.scale,
            order.backend,
            order.text_lengths,
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


def _projected(
    attn: Any, plan: JointPlan, segment: Any, tokens: torch.Tensor, places: Any, *, added: bool
) -> SegmentProjections:
    """The rows of a segment that the plan uses, projected, normed and turned: [rows, H, tokens, D].

    Args:
        added: by weights of the text's own.
    """
    used = [plan.used(part, segment) for part in ("query", "key", "value")]
    names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
    split = [getattr(attn, name)(take(tokens, rows)) for name, rows in zip(names, used, strict=True)]
    query, key, value = (part.unflatten(-1, (attn.heads, -1)) for part in split)
    norm_q, norm_k = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
    query, key = (query if norm_q is None else norm_q(query)), (key if norm_k is None else norm_k(key))
    if places is not None:
        query, key = (apply_rotary_emb(part, places, sequence_dim=1) for part in (query, key))
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a norm returns a wider type
    parts = zip((query, key, value), used, strict=True)
    return SegmentProjections(*(Rows(part.transpose(1, 2), rows) for part, rows in parts))
