"""Training the judge, and measuring its own error on renders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..judge import Judge
from .data import SceneCache
from .images import Images
from .loop import Fit, Fitted, fit
from .step import compute

__all__ = ["measure_judge", "train_judge"]


def train_judge(
    judge: Judge, images: Images, settings: Fit, checkpoint: Path, *, seed: int = 0, **options: Any
) -> Fitted:
    """Train on renders (see :func:`~.loop.fit`)."""
    truth, pictures, silhouettes = images.labels, images.pixels, images.masks

    def draw(step: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        rows = torch.randint(len(truth), (settings.batch,), generator=generator, device=generator.device)
        flaws = _flaws(pictures[rows].float() / 127.5 - 1, generator)
        return flaws, silhouettes[rows], truth[rows]

    def loss(
        network: Judge, seen: torch.Tensor, masks: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with compute(network):
            logits, mask = network(seen.to(next(network.parameters()).dtype))
        found = [F.cross_entropy(logit.float(), target[:, i]) for i, logit in enumerate(logits)]
        classes = torch.stack(found).sum()
        outline = F.binary_cross_entropy_with_logits(mask.float(), masks.float() / 255)
        return classes + 2 * outline, {"classes": classes, "mask": outline}

    return fit(judge, draw, loss, settings, checkpoint, seed=seed, **options)


def _flaws(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, noise and shift of brightness and contrast: the flaws of decoded pictures."""
    (count, _, height, width), device = pixels.shape, generator.device
    small = F.interpolate(pixels, scale_factor=0.5, mode="bilinear", antialias=True)
    blurred = F.interpolate(small, size=(height, width), mode="bilinear")
    mix, noise, gain = torch.rand(3, count, 1, 1, 1, generator=generator, device=device)
    shift = torch.randn(count, 3, 1, 1, generator=generator, device=device)
    pixels = mix * blurred + (1 - mix) * pixels
    pixels = (0.85 + 0.3 * gain) * pixels + 0.04 * shift
    return pixels + 0.12 * noise * torch.randn(pixels.shape, generator=generator, device=device)


def measure_judge(judge: Judge, cache: SceneCache) -> dict[str, float]:
    """The judge's own accuracy on renders: three accuracies and the mean IoU of its silhouettes, as fractions."""
    verdict = judge.look(cache.images)
    truth = cache.masks > 127
    overlap = (verdict.masks & truth).sum(axis=(1, 2)) / (verdict.masks | truth).sum(axis=(1, 2))
    scenes = cache.scenes
    return {
        "object": float(np.mean([a == s.object for a, s in zip(verdict.objects, scenes, strict=True)])),
        "colour": float(np.mean([a == s.colour for a, s in zip(verdict.colours, scenes, strict=True)])),
        "background": float(np.mean([a == s.background for a, s in zip(verdict.backgrounds, scenes, strict=True)])),
        "silhouette_iou": float(overlap.mean()),
        "images": len(scenes),
    }
