"""What a run will take, said before it begins: bytes from the model's shapes, seconds by how fast it has been here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..models.served_families import FAMILIES, family_of
from ..runs.making import is_flow, model_of, pixels_across
from ..runs.settings import Settings
from ..session.report import size_in_words
from .shapes import Cost, Shapes

__all__ = ["Estimate", "ModelPace"]

#: Seconds that a model's first, small calls may take, by which its speed is guessed until a run was made.
_TRIAL = 0.15


@dataclass(frozen=True)
class Estimate:
    """Of one run.

    Args:
        seconds: from its first step to its pictures.
        weights: bytes of the model, which are held already.
        working: bytes at once beyond these.
        maps: bytes that one step's attention maps would take, where they are kept.
    """

    seconds: float
    weights: int
    working: int
    maps: int

    def __str__(self) -> str:
        memory, weights = size_in_words(self.weights + self.working), size_in_words(self.weights)
        return (
            f"about {max(1, round(self.seconds))} s and {memory} of memory, {weights} of it the model; "
            f"one step's maps, kept, would be {size_in_words(self.maps)} more"
        )


class ModelPace:
    """How much a loaded model computes, and how fast.

    Args:
        pipe: it is called a few times, at half its own size, for a first idea of its speed.
    """

    def __init__(self, pipe: Any) -> None:
        self._shapes = Shapes(pipe)
        self._native: tuple[int, int] = pipe.native_size[::-1]
        self._multiple = pixels_across(pipe)
        self._served = FAMILIES[family_of(pipe)]
        self._seconds_per_flop = self._tried(pipe)

    def of(self, settings: Settings) -> Estimate | None:
        """What a run of some settings will take; None without a target, and for a size that the model does not make."""
        width, height = settings.size or self._native
        if width % self._multiple or height % self._multiple or min(width, height) < self._multiple:
            return None
        if not settings.targets:
            return None
        try:
            edit, plain, decoded = self._costs(settings, (width, height))
        except (RuntimeError, ValueError):  # how a model refuses a size, as one that has no places for so many tokens
            return None
        return Estimate(
            self._seconds_per_flop * _total(settings, edit, plain, decoded),
            self._shapes.weights,
            max(cost.peak for cost in (edit, plain, decoded)),
            edit.maps,
        )

    def learn(self, settings: Settings, seconds: float) -> None:
        """A run of generated images, with its size filled in, took some seconds."""
        assert settings.size is not None
        self._seconds_per_flop = seconds / _total(settings, *self._costs(settings, settings.size))

    def _costs(self, settings: Settings, size: tuple[int, int]) -> tuple[Cost, Cost, Cost]:
        """Of a step of the edit, a step without control, and the decoding of one run's images."""
        is_guided = self._served.guides and settings.guidance > self._served.unguided
        targets, halves = len(settings.targets), 2 if is_guided else 1
        free = self._shapes.step(halves * targets, size) if settings.control else Cost(0, 0, 0)
        return self._shapes.step(halves * (1 + targets), size), free, self._shapes.decode(1 + targets, size)

    def _tried(self, pipe: Any) -> float:
        """Seconds for each flop of a call of the model for one image of half its own size a side."""
        width, height = (max(self._multiple, side // 2 // self._multiple * self._multiple) for side in self._native)
        call = _small_call(pipe, height, width)
        begun, best = time.perf_counter(), float("inf")
        with torch.no_grad():
            while time.perf_counter() - begun < _TRIAL or best == float("inf"):
                start = time.perf_counter()
                call().cpu()  # waits for a device that is behind
                best = min(best, time.perf_counter() - start)
        return best / self._shapes.step(1, (width, height)).flops


def _small_call(pipe: Any, height: int, width: int) -> Callable[[], torch.Tensor]:
    """A call of a pipeline's model for one image of a size in pixels."""
    model, factor = model_of(pipe), pipe.vae_scale_factor
    like = {"device": model.device, "dtype": model.dtype}
    if is_flow(pipe):
        flow = pipe.flow()
        velocity = flow.velocity("", 1.0, (height, width), flow.text_length)
        channels = pipe.vae.config.latent_channels
        noise = flow.latents(torch.zeros(1, channels, height // factor, width // factor, **like))
        return lambda: velocity(noise, torch.tensor(0.5))
    latents = torch.zeros(1, model.config.in_channels, height // factor, width // factor, **like)
    told = pipe.conditions("", False, (height, width))
    return lambda: told.predict(model, latents, torch.ones((), device=model.device))


def _total(settings: Settings, edit: Cost, plain: Cost, decoded: Cost) -> float:
    return settings.steps * (edit.flops + plain.flops) + (1 + settings.control) * decoded.flops
