"""The attention processor that computes an edit's joint products in the blocks of Lumina 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from ...edits.joint_products import JointPlan
from ..layers.around import AroundPlain
from ..layers.captions import check_turned, lengths_asked, origins_of, stands_of
from ..layers.joint_computing import JointLayer
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import segment_projections
from ..layers.places import by_numbers

__all__ = ["EditLumina2Processor"]


class EditLumina2Processor(AroundPlain):
    """Drop-in processor for the layers of Lumina 2, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms and rotary embedding; several heads of queries share one of keys and values. Image tokens that stand in
    a row of another caption's length are turned to where that row's image begins.
    """

    plain = ("Lumina2AttnProcessor2_0",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, base_sequence_length
            )
        plan, site = order.plan, order.site
        assert isinstance(plan, JointPlan) and order.text_lengths is not None and site.tokens is not None
        if base_sequence_length is not None or image_rotary_emb is None:
            raise ValueError(
                f"{site.path} was called with base_sequence_length={base_sequence_length} and "
                f"{'no' if image_rotary_emb is None else 'a'} rotary embedding, as diffusers' model does not"
            )
        lengths = order.text_lengths if site.kind == "joint" else (0,) * plan.rows
        with_recorded, beyond = lengths_asked(order, lengths) if site.kind == "joint" else (lengths, 0)
        texts, rest = max(lengths), hidden_states.shape[1] - site.tokens
        # What follows a shorter caption stands for its padding, which nobody attends to.
        text, text_places = None if site.kind == "image" else hidden_states[:, :texts], image_rotary_emb[:, :texts]
        if text is not None and beyond > 0:  # of a recorded source
            text, text_places = (pad(part, (0, 0, 0, beyond)) for part in (text, text_places))
        image = hidden_states[:, texts:] if rest != texts else _images(hidden_states, lengths, site.tokens)
        check_joint_input(order, image, text, None)
        if len(set(with_recorded)) > 1:
            check_turned(plan.terms, with_recorded)
        places = _images(image_rotary_emb, lengths, site.tokens)
        own = None if text is None else segment_projections(attn, plan, "text", text, by_numbers(text_places))
        layer = JointLayer(
            segment_projections(attn, plan, "image", image, by_numbers(places)).beside("image", order.recorded),
            None if own is None else own.beside("text", order.recorded, ends=True),
            attn.scale,
            order.backend,
            None if own is None else with_recorded,
            origins=origins_of(order, places),
            stands=stands_of(order),
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        out = merged_heads(rows)
        if text_rows is not None:
            out = _sequence(merged_heads(text_rows)[:, :texts], out, lengths)
        return attn.to_out[1](attn.to_out[0](out))  # to_out[1] is dropout


def _images(tensor: torch.Tensor, starts: Sequence[int], tokens: int) -> torch.Tensor:
    """Of each row the image's tokens [B, N, …], which begin where its caption ends."""
    if len(set(starts)) == 1:
        return tensor[:, starts[0] : starts[0] + tokens]
    return torch.stack([row[start : start + tokens] for row, start in zip(tensor, starts, strict=True)])


def _sequence(text: torch.Tensor, image: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Captions [B, T, C] of these lengths, each followed by its image's tokens [B, N, C] and by zeros."""
    out = torch.cat([text, torch.zeros_like(image)], dim=1)
    for row, length in enumerate(lengths):
        out[row, length:] = 0
        out[row, length : length + image.shape[1]] = image[row]
    return out
