"""The attention processor that computes an edit's joint products in the blocks of FLUX.1."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb

from ..edits.joint_products import JointPlan
from .computing import Rows, take
from .dispatched import DispatchedAround
from .joint_computing import JointLayer, SegmentProjections
from .joint_processor import check_joint_input, joint_record, joint_rows, merged_heads

__all__ = ["EditFluxProcessor"]


class EditFluxProcessor(DispatchedAround):
    """Drop-in processor for diffusers' ``FluxAttention``, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms and rotary embedding. A single block's tokens are one tensor, text first. Tokens of a reference picture
    (Kontext) are a row's own as its text is: they go where the row's text goes, and its image asks for both.
    """

    plain = ("FluxAttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)
        plan = order.plan
        assert isinstance(plan, JointPlan) and order.site.tokens is not None
        is_single, given = encoder_hidden_states is None, hidden_states
        images, references = order.site.tokens, order.references
        if encoder_hidden_states is None:
            texts = hidden_states.shape[1] - images - references
            text, given = hidden_states[:, :texts], hidden_states[:, texts:]
        else:
            text = encoder_hidden_states
        image, reference = given[:, :images], given[:, images:]
        check_joint_input(order, given if reference.shape[1] != references else image, text, attention_mask)
        places = _places(image_rotary_emb, text.shape[1], images)
        own = _project(attn, plan, "text", text, places["text"], added=not is_single)
        if references:
            own = own.followed_by(_project(attn, plan, "text", reference, places["reference"], added=False))
        layer = JointLayer(
            _project(attn, plan, "image", image, places["image"], added=False).beside("image", order.recorded),
            own.beside("text", order.recorded),
            attn.head_dim**-0.5,
            order.backend,
            references=references,
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        assert text_rows is not None
        out, context = merged_heads(rows), merged_heads(text_rows)
        context, behind = context[:, : text.shape[1]], context[:, text.shape[1] :]
        if references:
            out = torch.cat([out, behind], dim=1)
        if is_single:
            return torch.cat([context, out], dim=1)
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(context)  # to_out[1] is dropout


def _places(rotary: tuple[torch.Tensor, torch.Tensor] | None, texts: int, images: int) -> dict[str, Any]:
    """The rotary embedding of each segment; it comes for all of them, text first and references last."""
    ends = {"text": slice(texts), "image": slice(texts, texts + images), "reference": slice(texts + images, None)}
    return {name: None if rotary is None else tuple(part[where] for part in rotary) for name, where in ends.items()}


def _project(
    attn: Any, plan: JointPlan, segment: Any, tokens: torch.Tensor, places: Any, *, added: bool
) -> SegmentProjections:
    """The rows of a segment that the plan uses, projected, normed and turned: [rows, H, tokens, D].

    Args:
        added: whether by the weights that a dual block has for its text.
    """
    used = [plan.used(part, segment) for part in ("query", "key", "value")]
    if attn.fused_projections:
        together = attn.to_added_qkv if added else attn.to_qkv
        split = [take(part, rows) for part, rows in zip(together(tokens).chunk(3, dim=-1), used, strict=True)]
    else:
        names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
        split = [getattr(attn, name)(take(tokens, rows)) for name, rows in zip(names, used, strict=True)]
    query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in split)
    query, key = (attn.norm_added_q(query), attn.norm_added_k(key)) if added else (attn.norm_q(query), attn.norm_k(key))
    if places is not None:
        query, key = (_turned(part, places) for part in (query, key))
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a norm returns a wider type
    parts = zip((query, key, value), used, strict=True)
    return SegmentProjections(*(Rows(part.transpose(1, 2), rows) for part, rows in parts))


def _turned(part: torch.Tensor, places: Any) -> torch.Tensor:
    """Queries or keys [rows, N, H, D] turned by their places; of no rows where all are known from a recording."""
    return apply_rotary_emb(part, places, sequence_dim=1) if part.shape[0] else part
