"""How far an edit is from its source: what is computed without any weights.

Of a region, both pictures are made black outside of it and then compared whole, which is what PIE-Bench's tables show.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import conv2d, pad

__all__ = ["measures", "ssim"]

#: Gaussian window of the structural similarity, in pixels, and its constants (Wang et al., 2004).
_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def measures(source: Image.Image, edited: Image.Image, mask: np.ndarray | None = None) -> dict[str, float | None]:
    """MSE (of values in [0, 1]), PSNR (dB; None where the pictures are equal) and SSIM, whole and of both regions.

    Args:
        source, edited: RGB images of one size.
        mask: booleans [H, W], what may change.
    """
    before, after = _values(source), _values(edited)
    found = _compared(before, after, "")
    if mask is not None:
        inside = torch.from_numpy(np.ascontiguousarray(mask))
        for name, region in (("inside", inside), ("outside", ~inside)):
            if region.any():
                found |= _compared(before * region, after * region, f" {name}")
    return found


def ssim(image: torch.Tensor, other: torch.Tensor) -> float:
    """Structural similarity of two images [C, H, W] of values in [0, 1], mean over pixels and channels.

    Edges are mirrored, as torchmetrics has it, by which PIE-Bench is measured. Wang et al.,
    Image quality assessment: from error visibility to structural similarity, 2004.
    """
    offsets = torch.arange(_WINDOW, dtype=image.dtype) - _WINDOW // 2
    bell = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    window = (bell / bell.sum())[None] * (bell / bell.sum())[:, None]
    planes = torch.stack((image, other, image * image, other * other, image * other))  # [5, C, H, W]
    mirrored = pad(planes, [_WINDOW // 2] * 4, mode="reflect").flatten(0, 1)[:, None]
    mean, other_mean, square, other_square, product = conv2d(mirrored, window[None, None]).unflatten(0, (5, -1))
    variances = square - mean**2 + other_square - other_mean**2
    covariance = product - mean * other_mean
    c1, c2 = _K1**2, _K2**2
    similar = (2 * mean * other_mean + c1) * (2 * covariance + c2)
    return float((similar / ((mean**2 + other_mean**2 + c1) * (variances + c2))).mean())


def _values(image: Image.Image) -> torch.Tensor:
    """An image as [3, H, W] in [0, 1], in float64: variances are differences of nearly equal numbers."""
    return torch.from_numpy(np.array(image.convert("RGB"), np.float64) / 255).permute(2, 0, 1)


def _compared(before: torch.Tensor, after: torch.Tensor, where: str) -> dict[str, float | None]:
    error = float(((before - after) ** 2).mean())
    psnr = -10 * math.log10(error) if error else None
    return {f"mse{where}": error, f"psnr{where}": psnr, f"ssim{where}": ssim(before, after)}
