"""The attention processor that computes an edit's joint products in the blocks of Nucleus-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from ...edits.joint_products import JointPlan
from ..layers.captions import lengths_asked
from ..layers.computing import Rows, take
from ..layers.dispatched import DispatchedAround
from ..layers.joint_computing import JointLayer, SegmentProjections
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import head_dim, segment_projections
from ..layers.places import Turn, by_numbers
from ..layers.text_order import counts_first

__all__ = ["EditNucleusProcessor"]


class EditNucleusProcessor(DispatchedAround):
    """Drop-in processor for the layers of Nucleus-Image, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms and rotary embedding. Text tokens ask for nothing, and of a text no more is computed than the longest
    has; tokens that count are put first.
    """

    plain = ("NucleusMoEAttnProcessor2_0",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        cached_txt_key: torch.Tensor | None = None,
        cached_txt_value: torch.Tensor | None = None,
    ) -> torch.Tensor:
        order = self.order
        if order is None:
            given = (encoder_hidden_states, attention_mask, image_rotary_emb, cached_txt_key, cached_txt_value)
            out: torch.Tensor = self.inner(attn, hidden_states, *given)
            return out
        plan, lengths = order.plan, order.text_lengths
        assert isinstance(plan, JointPlan) and image_rotary_emb is not None
        if cached_txt_key is not None:
            raise ValueError(
                f"{order.site.path} got keys and values of the text that were kept (cached_txt_key), which an edit "
                "does not know: leave them out of attention_kwargs"
            )
        check_joint_input(order, hidden_states, encoder_hidden_states, None)  # the mask is of padding: text_lengths
        assert encoder_hidden_states is not None
        rows = len(hidden_states)
        text, (places, text_places) = encoder_hidden_states, (part.expand(rows, -1, -1) for part in image_rotary_emb)
        if lengths is not None and attention_mask is not None:
            read = counts_first(attention_mask[:, -text.shape[1] :])[:, : max(lengths), None]
            text, text_places = text.take_along_dim(read, 1), text_places.take_along_dim(read, 1)
        known, beyond = lengths_asked(order, lengths or (text.shape[1],) * rows)
        if beyond > 0:  # of a recorded source
            text, text_places = (pad(part, (0, 0, 0, beyond)) for part in (text, text_places))
        layer = JointLayer(
            segment_projections(attn, plan, "image", hidden_states, by_numbers(places)).beside("image", order.recorded),
            _text(attn, plan, text, by_numbers(text_places)).beside("text", order.recorded, ends=True),
            head_dim(attn) ** -0.5,
            order.backend,
            None if set(known) == {text.shape[1]} else known,
            text_asks=False,
        )
        self.record = joint_record(plan, layer, attn.heads)
        image, _ = joint_rows(order, plan, layer)
        merged = attn.to_out[0](merged_heads(image))
        return attn.to_out[1](merged) if len(attn.to_out) > 1 else merged  # type: ignore[no-any-return]  # dropout


def _text(attn: Any, plan: JointPlan, text: torch.Tensor, turn: Turn) -> SegmentProjections:
    """Keys and values of the text [rows, H, T, D]; there are no queries."""
    of_keys, of_values = plan.used("key", "text"), plan.used("value", "text")
    width = head_dim(attn)
    key = attn.add_k_proj(take(text, of_keys)).unflatten(-1, (-1, width))
    key = key if attn.norm_added_k is None else attn.norm_added_k(key)
    value = attn.add_v_proj(take(text, of_values)).unflatten(-1, (-1, width)).transpose(1, 2)
    key = turn(key, of_keys).to(value.dtype).transpose(1, 2)
    return SegmentProjections(Rows(key[:0], ()), Rows(key, of_keys), Rows(value, of_values))
