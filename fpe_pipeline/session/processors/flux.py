"""The attention processor that computes an edit's joint products in the blocks of FLUX.1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch

from ...edits.joint_products import JointPlan
from ..layers.dispatched import DispatchedAround
from ..layers.instructions import Order
from ..layers.joint_computing import JointLayer, SegmentProjections
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import head_dim, segment_projections
from ..layers.places import Turn, by_tables
from ..layers.record import LayerRecord

__all__ = ["EditFluxProcessor", "Segment", "joint_tokens"]

Segment = Literal["image", "text"]


class EditFluxProcessor(DispatchedAround):
    """Drop-in processor for diffusers' ``FluxAttention`` and its like, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms and rotary embedding. A single block's tokens are one tensor, text first. Tokens of a reference picture
    (Kontext) are a row's own as its text is: they go where the row's text goes, and its image asks for both.
    """

    plain: ClassVar[tuple[str, ...]] = (
        "FluxAttnProcessor",
        "BriaAttnProcessor",
        "LongCatImageAttnProcessor",
        "OvisImageAttnProcessor",
    )
    #: Whether texts end where they end, with padding behind those that are shorter than the longest of a call.
    texts_end: ClassVar[bool] = False

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
        return self.edited(attn, order, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def edited(
        self,
        attn: Any,
        order: Order,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
        seen: torch.Tensor | None = None,
    ) -> Any:
        """What the layer gives where an order is carried out; ``seen`` is as :class:`.JointLayer` has it."""
        plan = order.plan
        assert isinstance(plan, JointPlan) and order.site.tokens is not None
        is_single, text, given = encoder_hidden_states is None, encoder_hidden_states, hidden_states
        if text is None:
            texts = hidden_states.shape[1] - order.site.tokens - order.references
            text, given = hidden_states[:, :texts], hidden_states[:, texts:]

        def projected(name: Segment, tokens: torch.Tensor, turn: Turn | None, added: bool) -> SegmentProjections:
            return segment_projections(attn, plan, name, tokens, turn, added=added, fused=attn.fused_projections)

        out, context, self.record = joint_tokens(
            attn,
            order,
            text,
            given,
            attention_mask,
            image_rotary_emb,
            projected,
            added=not is_single,
            seen=seen,
            ends=self.texts_end,
        )
        if is_single:
            return torch.cat([context, out], dim=1)
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(context)  # to_out[1] is dropout


def joint_tokens(
    attn: Any,
    order: Order,
    text: torch.Tensor,
    given: torch.Tensor,
    attention_mask: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    projected: Callable[[Segment, torch.Tensor, Turn | None, bool], SegmentProjections],
    *,
    added: bool,
    seen: torch.Tensor | None = None,
    ends: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, LayerRecord]:
    """A layer's order carried out.

    Args:
        attn: the layer.
        order: its order.
        text: tokens of the text [B, T, C], before they are projected or projected already.
        given: tokens of the image and of reference pictures behind them [B, N + R, C].
        attention_mask: has to be None.
        rotary: of all tokens, text first and references last.
        projected: makes of a segment's tokens, what turns them and whether they are the text's own weights' the rows of
            it that the plan uses.
        added: whether the text has weights of its own.
        seen: as :class:`.JointLayer` has it.
        ends: whether texts end where they end, with padding behind those that are shorter than the longest of a call.

    Returns:
        Image and reference tokens [B, N + R, H·D], text tokens [B, T, H·D], and what was done.
    """
    plan, images, references = order.plan, order.site.tokens, order.references
    assert isinstance(plan, JointPlan) and images is not None
    image, reference = given[:, :images], given[:, images:]
    check_joint_input(order, given if reference.shape[1] != references else image, text, attention_mask)
    turns = _turns(rotary, text.shape[1], images)
    own = projected("text", text, turns["text"], added)
    if references:  # before the text, behind whose end its padding may be
        own = projected("text", reference, turns["reference"], False).followed_by(own)
    layer = JointLayer(
        projected("image", image, turns["image"], False).beside("image", order.recorded),
        own.beside("text", order.recorded, ends=ends),
        head_dim(attn) ** -0.5,
        order.backend,
        order.lengths(text.shape[1]) if seen is None else None,
        references,
        seen=seen,
        references_first=True,
    )
    record = joint_record(plan, layer, attn.heads)
    rows, text_rows = joint_rows(order, plan, layer)
    assert text_rows is not None
    out, context = merged_heads(rows), merged_heads(text_rows)
    behind, context = context[:, :references], context[:, references:]
    return torch.cat([out, behind], dim=1) if references else out, context, record


def _turns(rotary: tuple[torch.Tensor, torch.Tensor] | None, texts: int, images: int) -> dict[str, Turn | None]:
    """The rotary embedding of each segment; it comes for all of them, text first and references last."""
    ends = {"text": slice(texts), "image": slice(texts, texts + images), "reference": slice(texts + images, None)}
    if rotary is None:
        return dict.fromkeys(ends)
    return {name: by_tables((rotary[0][where], rotary[1][where])) for name, where in ends.items()}
