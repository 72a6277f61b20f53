"""The attention processor that computes an edit's joint products in the blocks of Chroma."""

from __future__ import annotations

from typing import Any

import torch

from ..layers.instructions import Order
from .flux import EditFluxProcessor

__all__ = ["EditChromaProcessor"]


class EditChromaProcessor(EditFluxProcessor):
    """FLUX.1's processor, in layers that are told which tokens are padding of texts.

    The mask is that of the model's call, which the adapter has read: of truth values, the order holds the texts'
    lengths, and padding takes no attention; numbers are added to the scores here as diffusers does.
    """

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
        if attention_mask is None:  # as diffusers calls single blocks whose gradients are checkpointed
            if order.text_lengths is not None:
                raise ValueError(
                    f"{order.site.path} is not told the mask that the model got, as diffusers leaves it out of single "
                    "blocks whose gradients are checkpointed, so that padding counts there: call "
                    "transformer.disable_gradient_checkpointing(), or run without gradients"
                )
        elif attention_mask.dtype != torch.bool:
            assert order.site.tokens is not None
            # Of the last query, which is the image's: one for each key that is none of the padding.
            seen = attention_mask[:, 0, -1, : attention_mask.shape[-1] - order.site.tokens]
            seen = _with_recorded(seen.expand(order.plan.rows, -1), order)
        return super().edited(attn, order, hidden_states, encoder_hidden_states, None, image_rotary_emb, seen)


def _with_recorded(seen: torch.Tensor, order: Order) -> torch.Tensor:
    """The same of the batch's texts [rows, T] and of those that a recording holds, which follow them."""
    known = {} if order.recorded is None else order.recorded.text_lengths
    if not known:
        return seen
    rows, tokens = seen.shape
    places = torch.arange(tokens, device=seen.device)  # where it is needed: nothing is copied there
    beside = [places < known.get(row, tokens) for row in range(rows, max(known) + 1)]
    return torch.cat([seen, torch.stack(beside).to(seen)])
