"""Masks of padding for several images a prompt, at the rows of the texts that they are of."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..prompts.encoding import Encoding

__all__ = ["with_masks_in_order"]


def with_masks_in_order(encode: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The ``encode_prompt`` of a diffusers pipeline, of which each row has the mask of its own text.

    Pipelines of diffusers 0.42 that repeat texts prompt by prompt, and masks one after the other, cut a text off where
    another prompt's ends.
    """
    signature = inspect.signature(encode)

    @functools.wraps(encode)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        asked = Encoding.of(signature.bind(self, *args, **kwargs).arguments, {})
        encoded = encode(self, *args, **kwargs)
        return tuple(_in_order(part, asked.count or 1, asked.images or 1) for part in encoded)

    encode_prompt.__doc__ = "As in diffusers, but that of several images a prompt each has the mask of its own text."
    return encode_prompt


def _in_order(part: Any, prompts: int, images: int) -> Any:
    """A mask [prompts · images, tokens] prompt by prompt; anything else as it is."""
    if not isinstance(part, torch.Tensor) or part.ndim != 2 or len(part) != prompts * images:
        return part
    by_prompt = part.unflatten(0, (prompts, images))
    if bool((by_prompt == by_prompt[:, :1]).all()):
        return part
    return part.unflatten(0, (images, prompts)).transpose(0, 1).flatten(0, 1)
