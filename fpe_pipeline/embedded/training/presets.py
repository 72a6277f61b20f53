"""What a training depends on: sizes, widths and schedules. Nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["PRESETS", "Fit", "Preset", "Shares"]


@dataclass(frozen=True)
class Fit:
    """How long and how fast to train.

    Args:
        steps: optimiser steps.
        batch: samples a step.
        learning_rate: AdamW's, after ``warmup`` steps and before the cosine tail.
        warmup: steps of linear warm-up.
        tail: fraction of the training that the cosine tail to zero takes.
        weight_decay: AdamW's.
        ema: decay of the moving average of the weights; 0 keeps none.
        clip: largest gradient norm.
        max_minutes: ends the training (and places the tail) by the clock where that comes before ``steps``;
            such a run is repeatable only on an equally fast machine.
    """

    steps: int
    batch: int
    learning_rate: float = 1e-3
    warmup: int = 50
    tail: float = 0.5
    weight_decay: float = 1e-2
    ema: float = 0.0
    clip: float = 1.0
    max_minutes: float = math.inf

    def progress(self, step: int, minutes: float) -> float:
        """Fraction done, in [0, 1], by steps or by the clock, whichever is further."""
        return min(1.0, max(step / self.steps, minutes / self.max_minutes))

    def rate(self, step: int, progress: float) -> float:
        """Learning rate at a step."""
        warm = min(1.0, (step + 1) / self.warmup)
        into_tail = max(0.0, (progress - (1 - self.tail)) / self.tail)
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * into_tail))


@dataclass(frozen=True)
class Shares:
    """How a time box is shared out, each a fraction of what is left when the stage begins.

    Args:
        autoencoder, judge, text: of these stages.
        review: kept free at the end, for the export, the evaluation and the pictures; of what is left at first.
    """

    autoencoder: float = 0.17
    judge: float = 0.05
    text: float = 0.02
    review: float = 0.15


@dataclass(frozen=True)
class Preset:
    """Everything that a training depends on, apart from its seed and its time.

    Args:
        name: what it is called on the command line.
        size: pixels a side.
        scenes: renders to train on; a time box may leave some undrawn.
        held_out: renders of held-out triples to measure on.
        autoencoder, judge, text, diffusion: the schedules.
        channels: the UNet's width at each level.
        vae_channels: the autoencoder's.
        crop: pixels a side that the autoencoder sees. A batch of small crops shows more scenes in the same time; whole
            pictures are normalised as they will be in use.
        generated: pictures to draw when the model is measured.
        edits: pairs of each kind to edit when it is measured.
        steps: denoising steps of each.
        shares: of the time box.
    """

    name: str
    size: int
    scenes: int
    held_out: int
    autoencoder: Fit
    judge: Fit
    text: Fit
    diffusion: Fit
    channels: tuple[int, ...] = (64, 128)
    vae_channels: tuple[int, ...] = (16, 32, 64)
    crop: int = 48
    generated: int = 512
    edits: int = 0
    steps: int = 25
    shares: Shares = Shares()


PRESETS: dict[str, Preset] = {
    "cpu": Preset(
        name="cpu",
        size=80,
        scenes=16000,
        held_out=1024,
        autoencoder=Fit(steps=3488, batch=16, learning_rate=2e-3, warmup=100, tail=0.6, ema=0.995),
        judge=Fit(steps=550, batch=32, learning_rate=2e-3, ema=0.99),
        text=Fit(steps=300, batch=64),
        diffusion=Fit(steps=7377, batch=16, learning_rate=1e-3, warmup=100, ema=0.998),
    ),
    # Without a time box, the steps that a fast GPU takes in a quarter of an hour; with one, the clock decides.
    "gpu": Preset(
        name="gpu",
        size=128,
        scenes=48_000,
        held_out=1024,
        autoencoder=Fit(steps=30_000, batch=24, learning_rate=2e-3, warmup=100, tail=0.7, ema=0.998),
        judge=Fit(steps=4000, batch=128, learning_rate=2e-3, warmup=50, tail=0.7, ema=0.99),
        text=Fit(steps=600, batch=128),
        diffusion=Fit(steps=30_000, batch=128, learning_rate=1e-3, warmup=200, tail=0.7, ema=0.998),
        vae_channels=(32, 48, 64),
        crop=128,
        edits=64,
    ),
    "smoke": Preset(
        name="smoke",
        size=64,
        scenes=24,
        held_out=8,
        autoencoder=Fit(steps=4, batch=4, ema=0.9),
        judge=Fit(steps=4, batch=4, ema=0.9),
        text=Fit(steps=4, batch=4),
        diffusion=Fit(steps=4, batch=4, ema=0.9),
        channels=(32, 64),
        generated=2,
        edits=1,
        steps=2,
    ),
}
