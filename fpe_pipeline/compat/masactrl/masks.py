"""Masks of mutual self-attention: where they lie on a layer's tokens, and what they add to scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ...edits.masks import MaskImage

__all__ = ["on_grid", "read_masks", "save_mask", "score_biases"]

#: What is a mask by itself where a list of several is taken.
_ONE = (str, Path, Image.Image, np.ndarray, torch.Tensor)


def read_masks(name: str, given: Any, *, several: bool = False) -> torch.Tensor:
    """A mask [h, w], or where there may be several also [masks, h, w]; float32 in [0, 1].

    Args:
        name: of the argument.
        given: an array, a tensor or nested lists of truth values, of whole numbers 0 and 1, of bytes to 255 or of
            floats in [0, 1]; the path of a picture, or a PIL image. Several: a list of such, or an array of three axes.
        several: whether there may be more than one.

    Raises:
        ValueError: another shape, or values outside of these, NaN too.
        TypeError: anything else.
    """
    if several and isinstance(given, list | tuple) and given and isinstance(given[0], _ONE):
        masks = [read_masks(f"{name}[{place}]", one) for place, one in enumerate(given)]
        if len({one.shape for one in masks}) > 1:
            raise ValueError(f"{name}: expected masks of one size, got {[tuple(one.shape) for one in masks]}")
        return torch.stack(masks)
    try:
        if isinstance(given, str | Path | Image.Image):
            return MaskImage(given).values.float()
        values = given if isinstance(given, torch.Tensor) else torch.as_tensor(np.asarray(given))
        if several and values.ndim == 3 and len(values):
            return torch.stack([MaskImage(one).values.float() for one in values])
        return MaskImage(values).values.float()
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from None


def on_grid(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A mask [h, w] on a layer's tokens [N], by nearest neighbours."""
    return F.interpolate(mask[None, None].float(), grid)[0, 0].flatten()


def score_biases(mask: torch.Tensor, compat: str | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What is added to the scores of the source's tokens [N], for the object and for what is around it.

    The logarithm of a token's share, so that a token of 0.5 counts half: 0 where it belongs, −∞ where it does not. With
    "original" the mask's value is added, and −∞ where it is exactly 0, or 1, so that a soft mask excludes nothing. None
    for a branch that holds no token.
    """
    if compat == "original":
        inside, outside = mask.masked_fill(mask == 0, float("-inf")), mask.masked_fill(mask == 1, float("-inf"))
    else:
        share = mask.clamp(0, 1)
        inside, outside = share.log(), (1 - share).log()
    whole = (bias if bool((bias > float("-inf")).any()) else None for bias in (inside, outside))
    return next(whole), next(whole)


def save_mask(mask: torch.Tensor, path: str | Path) -> None:
    """A mask [h, w] as a grey picture."""
    grey: Any = (mask.detach().float().clamp(0, 1) * 255).round().cpu().numpy().astype(np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey).save(path)
