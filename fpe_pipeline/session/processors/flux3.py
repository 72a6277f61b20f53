"""The attention processor that computes an edit's joint products in the blocks of FLUX.3."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...edits.joint_products import JointPlan
from ..layers.dispatched import DispatchedAround
from ..layers.joint_computing import JointLayer, SegmentProjections
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import head_dim, segment_projections
from ..layers.places import Turn, by_tables
from .flux import Segment, joint_tokens

__all__ = ["EditFlux3Processor"]


class EditFlux3Processor(DispatchedAround):
    """Drop-in processor for the layers of FLUX.3, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditFluxProcessor` does in single blocks; blocks of image
    tokens alone have no text. Queries and keys are normed and turned in float32, as diffusers does it.
    """

    plain = ("Flux3AttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, attention_mask, image_rotary_emb)
        plan, images = order.plan, order.site.tokens
        assert isinstance(plan, JointPlan) and images is not None
        projections = partial(segment_projections, attn, plan, fused=attn.fused_projections, wide=True)
        if order.site.kind == "image":
            check_joint_input(order, hidden_states, None, attention_mask)
            image = projections("image", hidden_states, by_tables(image_rotary_emb)).beside("image", order.recorded)
            layer = JointLayer(image, None, head_dim(attn) ** -0.5, order.backend)
            self.record = joint_record(plan, layer, attn.heads)
            out = merged_heads(joint_rows(order, plan, layer)[0])
        else:
            texts = hidden_states.shape[1] - images - order.references

            def projected(name: Segment, tokens: torch.Tensor, turn: Turn | None, added: bool) -> SegmentProjections:
                return projections(name, tokens, turn)

            image_tokens, text_tokens, self.record = joint_tokens(
                attn,
                order,
                hidden_states[:, :texts],
                hidden_states[:, texts:],
                attention_mask,
                image_rotary_emb,
                projected,
                added=False,
            )
            out = torch.cat([text_tokens, image_tokens], dim=1)
        return attn.to_out[1](attn.to_out[0](out))  # the second is dropout
