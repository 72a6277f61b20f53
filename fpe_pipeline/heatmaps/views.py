"""Views of attention operators: principal components from products alone, and overlays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from fpe_kernels import LinearMap

from ..errors import InputError
from ..images.load import from_array

__all__ = ["overlay", "principal_components"]

_ITERATIONS = 12
_OVERSAMPLING = 8


def check_components(count: int, queries: int, keys: int) -> None:
    """Raise ValueError where maps of so many tokens do not have so many principal components."""
    if not 1 <= count <= min(queries - 1, keys):
        raise ValueError(f"expected 1 to {min(queries - 1, keys)} components of maps {queries} x {keys}, got {count}")


def principal_components(maps: Sequence[LinearMap], count: int) -> torch.Tensor:
    """Scores of the rows of a mean attention map on its principal components, by subspace iteration.

    With Ā the mean over maps and heads and C = Ā - 1 mean(Ā), the scores are the ``count`` leading left singular
    vectors of C times their singular values. C is applied as products with the maps and their adjoints.

    Args:
        maps: [1, H, N, M], of equal shape.
        count: how many, at most N - 1 and M.

    Returns:
        [count, N], float64.

    Raises:
        ValueError: more components than the maps have.
    """
    _, heads, queries, keys = maps[0].shape
    check_components(count, queries, keys)
    width = min(count + _OVERSAMPLING, queries, keys)
    device = maps[0].device
    start = torch.randn(keys, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)

    def mean(products: Iterable[torch.Tensor]) -> torch.Tensor:  # of [1, H, tokens, width], over heads and maps
        return torch.stack([product[0].double().mean(0) for product in products]).mean(0)

    def forward(x: torch.Tensor) -> torch.Tensor:
        product = mean(a @ x.to(a.dtype).expand(1, heads, -1, -1) for a in maps)
        return product - product.mean(0)

    def backward(y: torch.Tensor) -> torch.Tensor:
        y = y - y.mean(0)
        return mean(a.T @ y.to(a.dtype).expand(1, heads, -1, -1) for a in maps)

    basis = torch.linalg.qr(start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(backward(torch.linalg.qr(forward(basis)).Q)).Q
    left, values, _ = torch.linalg.svd(forward(basis), full_matrices=False)
    scores = (left * values)[:, :count].T
    largest = scores.gather(1, scores.abs().argmax(1, keepdim=True))
    signed: torch.Tensor = scores * torch.where(largest < 0, -1.0, 1.0)
    return signed


def overlay(heat: np.ndarray, image: Any, strength: float = 0.6) -> Image.Image:
    """An image with a map [h, w] laid over it, from transparent (its least) to red (its most).

    Args:
        heat: any finite numbers or truth values, of the image's proportions.
        image: a PIL image of any mode, or what pipelines give of one: an array [H, W, C] or a tensor [C, H, W] or
            [1, C, H, W] in [0, 1].
        strength: opacity of the largest value, in [0, 1].

    Raises:
        ValueError: a map of another rank, a strength outside [0, 1], or what is no picture, such as latents.
    """
    heat = np.asarray(heat, dtype=np.float64)  # differences of small integers would wrap, and of truth values are none
    if heat.ndim != 2 or not np.isfinite(heat).all():
        raise ValueError(f"expected a map [height, width] of finite numbers, got shape {heat.shape}")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"expected strength to be in [0, 1], got {strength}")
    if isinstance(image, np.ndarray | torch.Tensor):
        image = from_array(image)
    elif not isinstance(image, Image.Image):
        raise InputError(f"expected a PIL image, an array or a tensor of one image, got {type(image).__name__}")
    spread = float(heat.max() - heat.min())
    share = (heat - heat.min()) / spread if spread > 0 else np.zeros_like(heat)
    opacity = Image.fromarray((255 * strength * share).round().astype(np.uint8)).resize(
        image.size, Image.Resampling.BICUBIC
    )
    picture = image.convert("RGB")
    return Image.composite(Image.new("RGB", picture.size, (220, 20, 20)), picture, opacity)
