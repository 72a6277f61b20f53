"""The attention processor that computes an edit's joint products in the blocks of Z-Image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from ...edits.joint_products import JointPlan
from ..layers.captions import check_turned, lengths_asked, origins_of, stands_of
from ..layers.dispatched import DispatchedAround
from ..layers.instructions import Order
from ..layers.joint_computing import JointLayer
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import segment_projections
from ..layers.places import by_numbers

__all__ = ["EditZImageProcessor"]


class EditZImageProcessor(DispatchedAround):
    """Drop-in processor for the layers of Z-Image, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms and rotary embedding. Image tokens that stand in a row of another caption's length are turned to where
    that row's image begins. Tokens that fill up the image are a row's own, as those of a reference picture are in FLUX;
    tokens that fill up the caption are part of it.
    """

    plain = ("ZSingleStreamAttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        plan, site = order.plan, order.site
        assert isinstance(plan, JointPlan) and order.text_lengths is not None and site.tokens is not None
        if encoder_hidden_states is not None or freqs_cis is None:
            raise ValueError(
                f"{site.path} was called with {'no' if encoder_hidden_states is None else 'a'} text beside its tokens "
                f"and {'no' if freqs_cis is None else 'a'} rotary embedding, as diffusers' model does not"
            )
        lengths = order.text_lengths if site.kind == "joint" else (0,) * plan.rows
        images = site.tokens
        with_recorded, beyond = lengths_asked(order, lengths) if site.kind == "joint" else (lengths, 0)
        is_ragged = len(set(with_recorded)) > 1
        _check_sequence(order, hidden_states, attention_mask, lengths)
        text, text_places = None if site.kind == "image" else hidden_states[:, images:], freqs_cis[:, images:]
        if text is not None and beyond > 0:  # of negative prompts, which have left the batch, or of a recorded source
            text, text_places = (pad(part, (0, 0, 0, beyond)) for part in (text, text_places))
        check_joint_input(order, hidden_states[:, :images], text, None)
        if is_ragged:
            check_turned(plan.terms, with_recorded, mixes=False)
        places = freqs_cis[:, :images]
        own = None if text is None else segment_projections(attn, plan, "text", text, by_numbers(text_places))
        own = None if own is None else own.beside("text", order.recorded, ends=True)
        layer = JointLayer(
            segment_projections(attn, plan, "image", hidden_states[:, :images], by_numbers(places)).beside(
                "image", order.recorded
            ),
            own,
            attn.scale,
            order.backend,
            with_recorded if is_ragged or beyond > 0 else None,
            references=order.references,
            origins=origins_of(order, places),
            references_first=True,
            stands=stands_of(order),
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        out = merged_heads(rows)
        if text_rows is not None:
            out = torch.cat([out, merged_heads(text_rows)], dim=1)[:, : hidden_states.shape[1]]
        out = attn.to_out[0](out)
        return attn.to_out[1](out) if len(attn.to_out) > 1 else out  # dropout


def _check_sequence(
    order: Order, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, lengths: Sequence[int]
) -> None:
    """Raise ValueError where tokens are not the image's, what fills them up, and captions of these lengths."""
    site, filling, tokens = order.site, order.references, hidden_states.shape[1]
    assert site.tokens is not None
    if site.kind == "image" and filling:
        raise ValueError(
            f"{site.path} attends to {filling} tokens that fill up the {site.tokens} of an image of this size, which "
            "an edit of image tokens alone does not name: leave the layer out with layers=, or choose a height and "
            "width whose tokens are a multiple of 32"
        )
    if tokens != site.tokens + filling + max(lengths):
        raise ValueError(
            f"{site.path} was expected to have {site.tokens} image tokens, {filling} that fill them up and "
            f"{max(lengths)} of captions, and got {tokens}: this version of the model lays its sequence out otherwise"
        )
    if (attention_mask is not None) is not (len(set(lengths)) > 1):
        raise ValueError(
            f"{site.path} got {'no' if attention_mask is None else 'a'} mask of padding beside captions of "
            f"{sorted(set(lengths))} tokens: this version of the model pads its sequence otherwise"
        )
