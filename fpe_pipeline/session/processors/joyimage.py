"""The attention processor that computes an edit's joint products in the blocks of JoyImage."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ...edits.joint_products import JointPlan
from ..layers.computing import take
from ..layers.dispatched import DispatchedAround
from ..layers.joint_computing import JointLayer, SegmentProjections
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import segment_rows
from ..layers.places import Turn, by_tables

__all__ = ["EditJoyImageProcessor"]


class EditJoyImageProcessor(DispatchedAround):
    """Drop-in processor for diffusers' ``JoyImageAttention``, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms and rotary embedding, each stream's own. Tokens of a picture that is shown follow the image's, and are a
    row's own as its text is.
    """

    plain = ("JoyImageAttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        image_rotary_emb: tuple[Any, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, image_rotary_emb, **kwargs)
        plan, images, references = order.plan, order.site.tokens, order.references
        assert isinstance(plan, JointPlan) and images is not None
        image, reference = hidden_states[:, :images], hidden_states[:, images:]
        whole = hidden_states if reference.shape[1] != references else image
        check_joint_input(order, whole, encoder_hidden_states, None)
        assert encoder_hidden_states is not None
        places, text_places = (None, None) if image_rotary_emb is None else image_rotary_emb
        own = _segment(attn, plan, "text", encoder_hidden_states, by_tables(text_places), of_text=True)
        if references:
            own = _segment(attn, plan, "text", reference, _turn(places, slice(images, None))).followed_by(own)
        layer = JointLayer(
            _segment(attn, plan, "image", image, _turn(places, slice(images))),
            own,
            attn.head_dim**-0.5,
            order.backend,
            references=references,
            references_first=True,
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        assert text_rows is not None
        out, context = merged_heads(rows), merged_heads(text_rows)
        out, context = torch.cat([out, context[:, :references]], dim=1), context[:, references:]
        return attn.img_attn_proj(out), attn.txt_attn_proj(context)


def _turn(places: tuple[torch.Tensor, torch.Tensor] | None, tokens: slice) -> Turn | None:
    """The rotary embedding of some of the image's tokens, from cosines and sines [tokens, D] of all of them."""
    return None if places is None else by_tables((places[0][tokens], places[1][tokens]))


def _segment(
    attn: Any,
    plan: JointPlan,
    segment: Literal["image", "text"],
    tokens: torch.Tensor,
    turn: Turn | None,
    *,
    of_text: bool = False,
) -> SegmentProjections:
    """The rows of a segment that the plan uses, by one projection of all three: [rows, H, tokens, D]."""
    used = [plan.used(part, segment) for part in ("query", "key", "value")]
    together = attn.txt_attn_qkv if of_text else attn.img_attn_qkv
    norms = (attn.txt_attn_q_norm, attn.txt_attn_k_norm) if of_text else (attn.img_attn_q_norm, attn.img_attn_k_norm)
    split = [take(part, rows) for part, rows in zip(together(tokens).chunk(3, dim=-1), used, strict=True)]
    return segment_rows(attn, used, split, turn, norms=norms)
