"""The attention processor that computes an edit's joint products in the blocks of HiDream-I1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...edits.joint_products import JointPlan
from ..layers.around import AroundPlain
from ..layers.computing import Rows
from ..layers.joint_computing import JointLayer
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import segment_projections
from ..layers.places import by_matrices

__all__ = ["EditHiDreamProcessor"]


class EditHiDreamProcessor(AroundPlain):
    """Drop-in processor for the layers of HiDream-I1, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms over all heads and their rotary embedding. Tokens that fill up the image are a row's own, as in
    Z-Image; their keys are zeros, as in the unedited layer. A single block's tokens are one tensor, image first.
    """

    plain = ("HiDreamAttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        hidden_states_masks: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(
                attn, hidden_states, hidden_states_masks, encoder_hidden_states, image_rotary_emb, *args, **kwargs
            )
        plan, images, filling = order.plan, order.site.tokens, order.references
        assert isinstance(plan, JointPlan) and images is not None and image_rotary_emb is not None
        is_single, text, given = encoder_hidden_states is None, encoder_hidden_states, hidden_states
        if text is None:
            given, text = hidden_states[:, : images + filling], hidden_states[:, images + filling :]
        image, beside = given[:, :images], given[:, images:]
        check_joint_input(order, given if beside.shape[1] != filling else image, text, None)  # its mask is of `filling`
        places = image_rotary_emb[0, :, 0]
        own = segment_projections(
            _stream(attn, "" if is_single else "_t"), plan, "text", text, by_matrices(places[images + filling :])
        )
        if filling:
            padding = segment_projections(_stream(attn), plan, "text", beside)
            key = Rows(torch.zeros_like(padding.key.tensor), padding.key.rows)
            own = padding._replace(key=key).followed_by(own)
        layer = JointLayer(
            segment_projections(_stream(attn), plan, "image", image, by_matrices(places[:images])),
            own,
            (attn.inner_dim // attn.heads) ** -0.5,
            order.backend,
            references=filling,
            references_first=True,
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        assert text_rows is not None
        out, context = merged_heads(rows), merged_heads(text_rows)
        if is_single:
            return attn.to_out(torch.cat([out, context], dim=1))
        return attn.to_out(torch.cat([out, context[:, :filling]], dim=1)), attn.to_out_t(context[:, filling:])


class _Stream(NamedTuple):
    """Weights of a stream of a layer's tokens, under the names that they have in diffusers' ``Attention``."""

    to_q: Any
    to_k: Any
    to_v: Any
    norm_q: Callable[[torch.Tensor], torch.Tensor]
    norm_k: Callable[[torch.Tensor], torch.Tensor]
    head_dim: int


def _stream(attn: Any, end: str = "") -> _Stream:
    """Of a layer the stream whose weights' names end so: "" of its image, or of all tokens, "_t" of its text."""
    query, key, value = (getattr(attn, f"to_{letter}{end}") for letter in "qkv")
    norm_q, norm_k = (_over_heads(getattr(attn, f"{letter}_rms_norm{end}")) for letter in "qk")
    return _Stream(query, key, value, norm_q, norm_k, attn.inner_dim // attn.heads)


def _over_heads(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A norm over all heads at once, of [rows, tokens, H, D]."""

    def normed(part: torch.Tensor) -> torch.Tensor:
        whole: torch.Tensor = norm(part.flatten(-2))
        return whole.view(part.shape)

    return normed
