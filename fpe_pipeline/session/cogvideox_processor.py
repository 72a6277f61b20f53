"""The attention processor that computes an edit's joint products in the blocks of CogVideoX."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb

from ..edits.joint_products import JointPlan
from .around import ProcessorAround, may_do_more
from .computing import Rows, take
from .joint_computing import JointLayer, SegmentProjections
from .joint_processor import check_joint_input, is_fused, joint_record, joint_rows, merged_heads

__all__ = ["EditCogVideoXProcessor", "unsupported_cogvideox_reasons"]

_PLAIN = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")


def unsupported_cogvideox_reasons(attn: Any, processor: Any, override: tuple[type, ...] = ()) -> list[str]:
    """Why a layer of CogVideoX cannot be edited; empty where it can.

    Args:
        attn: the diffusers ``Attention`` module.
        processor: the processor it has without the edit.
        override: further processor classes that an edit may compute in the stead of.
    """
    known = type(processor).__name__ in _PLAIN or type(processor) in override
    return [] if known else [may_do_more(processor)]


class EditCogVideoXProcessor(ProcessorAround):
    """Drop-in processor for the layers of CogVideoX, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, of the tokens of all frames and
    of the text, from queries and keys after their norms and rotary embedding.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        plan = order.plan
        assert isinstance(plan, JointPlan)
        check_joint_input(order, hidden_states, encoder_hidden_states, attention_mask)
        fused = is_fused(self.inner)
        layer = JointLayer(
            _projected(attn, plan, "image", hidden_states, image_rotary_emb, fused),
            _projected(attn, plan, "text", encoder_hidden_states, None, fused),
            attn.scale,
            order.backend,
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        assert text_rows is not None
        # to_out[1] is dropout
        return tuple(attn.to_out[1](attn.to_out[0](merged_heads(part))) for part in (rows, text_rows))


def _projected(
    attn: Any, plan: JointPlan, segment: Any, tokens: torch.Tensor, places: Any, fused: bool
) -> SegmentProjections:
    """The rows of a segment that the plan uses, projected, normed and turned: [rows, H, tokens, D]."""
    used = [plan.used(part, segment) for part in ("query", "key", "value")]
    if fused:
        split = [take(part, rows) for part, rows in zip(attn.to_qkv(tokens).chunk(3, dim=-1), used, strict=True)]
    else:
        layers = (attn.to_q, attn.to_k, attn.to_v)
        split = [layer(take(tokens, rows)) for layer, rows in zip(layers, used, strict=True)]
    query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in split)
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    if places is not None:
        query, key = (apply_rotary_emb(part, places) for part in (query, key))
    # A norm may return a wider type (under autocast), which attention has to narrow again.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return SegmentProjections(*(Rows(part, rows) for part, rows in zip((query, key, value), used, strict=True)))
