"""The attention processor that computes an edit's joint products in the blocks of FIBO."""

from __future__ import annotations

from typing import Any

import torch

from ..layers.instructions import Order
from .flux import EditFluxProcessor

__all__ = ["EditBriaFiboProcessor"]


class EditBriaFiboProcessor(EditFluxProcessor):
    """FLUX.1's processor, in layers that are told which tokens are padding of texts: the order holds their lengths."""

    plain = ("BriaFiboAttnProcessor", "BriaAttnProcessor")
    texts_end = True

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
        return super().edited(attn, order, hidden_states, encoder_hidden_states, None, image_rotary_emb, seen)
