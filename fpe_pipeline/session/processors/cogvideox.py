"""The attention processors that compute an edit's joint products in the blocks of CogVideoX, CogView and GLM-Image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ...edits.joint_products import JointPlan
from ..layers.around import AroundPlain
from ..layers.dispatched import DispatchedAround
from ..layers.joint_computing import JointLayer
from ..layers.joint_processor import check_joint_input, is_fused, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import segment_projections
from ..layers.places import by_tables

__all__ = ["EditCogVideoXProcessor", "EditCogView4Processor", "EditGlmImageProcessor"]


class EditCogVideoXProcessor(AroundPlain):
    """Drop-in processor for the layers of CogVideoX, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, of the tokens of all frames and
    of the text, from queries and keys after their norms and rotary embedding.
    """

    plain: ClassVar[tuple[str, ...]] = (
        "CogVideoXAttnProcessor2_0",
        "FusedCogVideoXAttnProcessor2_0",
        "CogView4AttnProcessor",
    )
    #: Where the two parts of a number that is turned stand: side by side (-1), or in the halves of a head (-2).
    parts_at = -1

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
        turn = by_tables(image_rotary_emb, self.parts_at)
        image = segment_projections(attn, plan, "image", hidden_states, turn, fused=fused)
        text = segment_projections(attn, plan, "text", encoder_hidden_states, fused=fused)
        layer = JointLayer(
            image.beside("image", order.recorded),
            text.beside("text", order.recorded),
            attn.scale,
            order.backend,
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        assert text_rows is not None
        # to_out[1] is dropout
        return tuple(attn.to_out[1](attn.to_out[0](merged_heads(part))) for part in (rows, text_rows))


class EditCogView4Processor(EditCogVideoXProcessor):
    """The same for the layers of CogView 4."""

    parts_at = -2


class EditGlmImageProcessor(DispatchedAround, EditCogView4Processor):
    """The same for the layers of GLM-Image, in calls that keep no keys and values."""

    plain = ("GlmImageAttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        kv_cache: Any = None,
    ) -> Any:
        given = (attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return self.inner(*given, kv_cache) if self.order is None else super().__call__(*given)
