"""The attention processor that computes an edit's joint products in the blocks of Ideogram 4."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from ...edits.joint_products import JointPlan
from ..layers.dispatched import DispatchedAround
from ..layers.joint_computing import JointLayer
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import segment_projections
from ..layers.places import by_tables_of_rows
from ..layers.text_order import last_first

__all__ = ["EditIdeogram4Processor"]


class EditIdeogram4Processor(DispatchedAround):
    """Drop-in processor for the layers of Ideogram 4, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms and rotary embedding. Padding stands before a row's text, which the pipeline fills up to 2048 tokens: of
    it no more is computed than the longest text has, and tokens that count are put first for the products.
    """

    plain = ("Ideogram4AttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        order = self.order
        if order is None:
            out: torch.Tensor = self.inner(attn, hidden_states, attention_mask, image_rotary_emb)
            return out
        plan, site, lengths = order.plan, order.site, order.text_lengths
        assert isinstance(plan, JointPlan) and site.tokens is not None and image_rotary_emb is not None
        texts = hidden_states.shape[1] - site.tokens
        check_joint_input(order, hidden_states[:, texts:], hidden_states[:, :texts], None)  # the mask is of padding
        cosines, sines = image_rotary_emb
        turn = by_tables_of_rows(cosines[:, texts:], sines[:, texts:])
        image = segment_projections(attn, plan, "image", hidden_states[:, texts:], turn)
        if lengths is None:  # of the model that guides, which reads no text
            layer = JointLayer(image, None, attn.head_dim**-0.5, order.backend)
        else:
            first = texts - max(lengths)
            read = last_first(lengths, hidden_states.device).unsqueeze(-1)
            window = (part[:, first:texts].take_along_dim(read, 1) for part in (hidden_states, cosines, sines))
            tokens, *turns = window
            text = segment_projections(attn, plan, "text", tokens, by_tables_of_rows(*turns))
            layer = JointLayer(image, text, attn.head_dim**-0.5, order.backend, lengths)
        self.record = joint_record(plan, layer, attn.num_heads)
        rows, text_rows = joint_rows(order, plan, layer)
        merged = merged_heads(rows)
        if text_rows is not None:
            context = merged_heads(text_rows).take_along_dim(read.argsort(1), 1)
            merged = pad(torch.cat([context, merged], dim=1), (0, 0, first, 0))
        return attn.to_out[0](merged)  # type: ignore[no-any-return]
