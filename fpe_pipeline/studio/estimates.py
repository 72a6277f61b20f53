"""What a run will take, said before it begins: bytes from the model's shapes, seconds by how fast it has been here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..runs.settings import Settings
from ..session.report import size_in_words
from .shapes import Cost, Shapes

__all__ = ["Estimate", "ModelPace"]

#: Seconds that a model's first, small calls may take, by which its speed is guessed until a run was made.
_TRIAL = 0.3


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
        self._factor: int = pipe.vae_scale_factor
        self._seconds_per_flop = self._tried(pipe)

    def of(self, settings: Settings) -> Estimate | None:
        """What a run of some settings will take; None for a size that the model does not make."""
        width, height = settings.size or self._native
        if width % self._factor or height % self._factor or min(width, height) < self._factor:
            return None
        edit, plain, decoded = self._costs(settings, (width, height))
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
        targets, halves = len(settings.targets), 2 if settings.guidance > 1 else 1
        free = self._shapes.step(halves * targets, size) if settings.control else Cost(0, 0, 0)
        return self._shapes.step(halves * (1 + targets), size), free, self._shapes.decode(1 + targets, size)

    def _tried(self, pipe: Any) -> float:
        """Seconds for each flop of a call of the UNet for one image of half the model's size a side."""
        width, height = (max(self._factor, side // 2 // self._factor * self._factor) for side in self._native)
        config, unet = pipe.unet.config, pipe.unet
        like = {"device": unet.device, "dtype": unet.dtype}
        latents = torch.zeros(1, config.in_channels, height // self._factor, width // self._factor, **like)
        words = torch.zeros(1, pipe.tokenizer.model_max_length, config.cross_attention_dim, **like)
        begun, best = time.perf_counter(), float("inf")
        with torch.no_grad():
            while time.perf_counter() - begun < _TRIAL or best == float("inf"):
                start = time.perf_counter()
                unet(latents, 1, words, return_dict=False)[0].cpu()  # waits for a device that is behind
                best = min(best, time.perf_counter() - start)
        return best / self._shapes.step(1, (width, height)).flops


def _total(settings: Settings, edit: Cost, plain: Cost, decoded: Cost) -> float:
    return settings.steps * (edit.flops + plain.flops) + (1 + settings.control) * decoded.flops
