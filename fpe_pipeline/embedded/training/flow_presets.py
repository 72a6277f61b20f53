"""What the training of the embedded transformer depends on. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from .presets import Fit

__all__ = ["FLOW_PRESETS", "FlowPreset"]


@dataclass(frozen=True)
class FlowPreset:
    """Everything that the training depends on, apart from its seed and its time.

    Args:
        name: what it is called on the command line.
        size: pixels a side.
        scenes: renders to train on.
        flow: the schedule.
        layers, heads: of the transformer, whose heads are 32 wide.
        second: width of the second text encoder; the first is the embedded model's.
        generated: pictures to draw when the model is measured.
        steps: denoising steps of each.
        guidance: of each.
        shift: of the scheduler's times towards noise.
        text_tokens: of T5's place in each; None for the pipeline's own number.
        held_out: renders of held-out triples to measure autoencoder and judge on.
        review: fraction of a time box that is kept for measuring.
    """

    name: str
    size: int
    scenes: int
    flow: Fit
    layers: int = 5
    heads: int = 4
    second: int = 32
    generated: int = 320
    steps: int = 20
    guidance: float = 4.0
    shift: float = 1.0
    text_tokens: int | None = None
    held_out: int = 512
    review: float = 0.1


FLOW_PRESETS: dict[str, FlowPreset] = {
    "cpu": FlowPreset(
        name="cpu",
        size=64,
        scenes=16_000,
        flow=Fit(steps=7000, batch=24, learning_rate=1e-3, warmup=200, tail=0.6, ema=0.998),
    ),
    "gpu": FlowPreset(
        name="gpu",
        size=64,
        scenes=48_000,
        flow=Fit(steps=60_000, batch=256, learning_rate=1e-3, warmup=500, tail=0.7, ema=0.999),
        generated=512,
    ),
    "smoke": FlowPreset(
        name="smoke",
        size=64,
        scenes=24,
        flow=Fit(steps=4, batch=4, ema=0.9),
        layers=2,
        heads=2,
        generated=2,
        steps=2,
        held_out=4,
    ),
}
