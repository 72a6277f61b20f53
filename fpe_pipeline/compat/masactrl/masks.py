"""Masks of mutual self-attention: where they lie on a layer's tokens, and what they add to scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

__all__ = ["on_grid", "save_mask", "score_biases"]


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
