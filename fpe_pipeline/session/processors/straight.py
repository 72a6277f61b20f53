"""Layers of a UNet that nobody edits, computed as diffusers' default processor does, with less Python around it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from ..layers.straight_line import is_straight, unedited_layer

__all__ = ["StraightAttnProcessor", "goes_straight", "straighten", "unstraighten"]


class StraightAttnProcessor(AttnProcessor2_0):  # type: ignore[misc]  # diffusers is not typed
    """diffusers' ``AttnProcessor2_0`` with less Python around it, for the layers that nobody edits in a session.

    It computes the same to the bit. Where a layer asks for more than projections around attention, or is compiled,
    which leaves no Python to save, it is the processor that it stands for.

    Args:
        inner: the layer's processor without the session; a new one where diffusers makes a processor of this class,
            as it does for every layer when it loads an IP-Adapter.
    """

    def __init__(self, inner: AttnProcessor2_0 | None = None) -> None:
        super().__init__()
        self.inner = AttnProcessor2_0() if inner is None else inner

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if args or not goes_straight(attn, hidden_states, attention_mask, kwargs):
            out: torch.Tensor = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
            return out
        return unedited_layer(attn, hidden_states, encoder_hidden_states)

    def __deepcopy__(self, memo: dict[int, Any]) -> AttnProcessor2_0:
        """What a copy of the layer has, which is in no session."""
        return copy.deepcopy(self.inner, memo)


# Which keywords diffusers passes on, worked out once and not at every call of a layer.
StraightAttnProcessor.__call__.__signature__ = inspect.signature(AttnProcessor2_0.__call__)  # type: ignore[attr-defined]


def straighten(layer: Any) -> bool:
    """Have a layer computed by :class:`StraightAttnProcessor`, if diffusers' default processor computes it now.

    Returns:
        Whether it is, be it that somebody has put one of a session that is over back.
    """
    if type(layer.processor) is AttnProcessor2_0:
        layer.set_processor(StraightAttnProcessor(layer.processor))
    return isinstance(layer.processor, StraightAttnProcessor)


def unstraighten(layer: Any) -> None:
    """Give a layer back the processor that :func:`straighten` has found there."""
    if isinstance(layer.processor, StraightAttnProcessor):
        layer.set_processor(layer.processor.inner)


def goes_straight(attn: Any, hidden_states: torch.Tensor, mask: Any, further: dict[str, Any]) -> bool:
    """Whether a call of a layer is projections around attention and nothing else.

    Args:
        attn: the diffusers ``Attention``.
        hidden_states: [B, N, C].
        mask, further: what else it receives, of which nothing may be.
    """
    return not further and not torch.compiler.is_compiling() and is_straight(attn, hidden_states, mask)
