"""The attention processor that computes an edit's products in the blocks of Sana."""

from __future__ import annotations

from typing import Any

import torch

from .ltx import EditLTXProcessor

__all__ = ["EditSanaProcessor"]

_LINEAR = (
    "its attention is linear, values summed over tokens before queries are asked, so that it has no map to replace or "
    "to read: use an edit of the attention to the text alone, such as PromptToPromptEdit(…, self_replace_steps=0), or "
    "heat_maps of words"
)


class EditSanaProcessor(EditLTXProcessor):
    """Drop-in processor for the layers of Sana that attend to its text, wrapped around the one that a layer has.

    With an order it computes the order's products as :class:`.EditAttnProcessor` does, from queries and keys after
    their norms over all heads at once, where a model has any. A text's padding takes no attention.
    """

    plain = ("SanaAttnProcessor2_0",)

    @classmethod
    def unsupported_reasons(cls, attn: Any, processor: Any, override: tuple[type, ...] = ()) -> list[str]:
        if "SanaLinear" in type(processor).__name__:
            return [_LINEAR]
        return super().unsupported_reasons(attn, processor, override)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        out = self._edited(order, attn, hidden_states, encoder_hidden_states, attention_mask)
        return out / attn.rescale_output_factor
