"""The attention processor that computes an edit's joint products in the blocks of Bria FIBO 2."""

from __future__ import annotations

from typing import Any

import torch

from ...edits.joint_products import JointPlan
from ..layers.dispatched import DispatchedAround
from ..layers.joint_computing import JointLayer
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import head_dim, segment_projections
from ..layers.places import by_numbers

__all__ = ["EditBriaFibo2Processor"]


class EditBriaFibo2Processor(DispatchedAround):
    """Drop-in processor for the layers of Bria FIBO 2, wrapped around the one that a layer already has.

    With an order it computes the order's products as :class:`.EditJointProcessor` does, from queries and keys after
    their norms and rotary embedding. Gist tokens are what text tokens are in other models; tokens of pictures that are
    edited are a row's own.
    """

    plain = ("BriaFibo2AttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        order = self.order
        if order is None:
            out: torch.Tensor = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
            return out
        plan, site, shown = order.plan, order.site, order.references
        assert isinstance(plan, JointPlan) and site.tokens is not None and freqs_cis is not None
        if site.kind == "image" and shown:
            raise ValueError(
                f"{site.path} attends to {shown} tokens of pictures that are edited, beside those of the image, which "
                "an edit of image tokens alone does not name: leave the layer out with layers="
            )
        # Gist tokens stand last where a mask says which of them are padding.
        gist = hidden_states.shape[1] - site.tokens - shown
        start = gist if attention_mask is None else 0
        images, pictures = slice(start, start + site.tokens), slice(start + site.tokens, start + site.tokens + shown)
        texts = slice(gist) if attention_mask is None else slice(site.tokens + shown, None)
        text = None if site.kind == "image" else hidden_states[:, texts]
        check_joint_input(order, hidden_states[:, images], text, None)  # the mask is of padding: text_lengths
        places = freqs_cis.expand(len(hidden_states), -1, -1)

        def projected(segment: str, where: slice) -> Any:
            return segment_projections(attn, plan, segment, hidden_states[:, where], by_numbers(places[:, where]))

        own = None if text is None else projected("text", texts)
        if own is not None and shown:
            own = projected("text", pictures).followed_by(own)
        layer = JointLayer(
            projected("image", images),
            own,
            head_dim(attn) ** -0.5,
            order.backend,
            order.text_lengths if own is not None else None,
            shown,
            references_first=True,
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        merged = merged_heads(rows)
        if text_rows is not None:
            beside = merged_heads(text_rows)
            parts = [merged, beside[:, :shown], beside[:, shown:]]  # image, pictures, gist
            merged = torch.cat([parts[2], *parts[:2]] if attention_mask is None else parts, dim=1)
        return attn.to_out[0](merged)  # type: ignore[no-any-return]
