"""One training loop for every network here: seeded by step, resumable, aware of the time it may take."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

__all__ = ["Fit", "fit"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """How long and how fast to train.

    Attributes:
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


Loss = Callable[[int, torch.Generator], tuple[torch.Tensor, dict[str, float]]]


def fit(
    module: nn.Module,
    loss: Loss,
    settings: Fit,
    checkpoint: Path,
    *,
    seed: int = 0,
    save_every: int = 250,
    stop_after: int | None = None,
    on_save: Callable[[int, dict[str, torch.Tensor]], None] | None = None,
) -> bool:
    """Train ``module`` in place, continuing from ``checkpoint`` if it exists.

    The random generator of step ``i`` is seeded from ``seed`` and ``i``, so a resumed run draws what an uninterrupted
    one would have drawn and ends with the same weights.

    Args:
        module: what holds every trained parameter; at the end it holds the averaged weights.
        loss: maps (step, generator) to the loss and the figures to report beside it.
        settings: schedule.
        checkpoint: file that is replaced atomically at each save.
        seed: of the run.
        save_every: steps between saves.
        stop_after: leave after this many steps in this call (the training stays unfinished).
        on_save: called with the step and the averaged state at each save.

    Returns:
        Whether the training is finished.
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
    )
    step, minutes = 0, 0.0
    average = {name: value.detach().clone().float() for name, value in module.state_dict().items()}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=next(module.parameters()).device, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        step, minutes, average = saved["step"], saved["minutes"], saved["average"]
        log.info("%s: continuing from step %d", checkpoint.stem, step)

    def save() -> None:
        partial = checkpoint.with_suffix(".partial")
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        torch.save({**state, "step": step, "minutes": minutes}, partial)
        os.replace(partial, checkpoint)
        if on_save is not None:
            on_save(step, average)

    module.train()
    begun, first = time.monotonic() - 60 * minutes, step
    reported, seen = time.monotonic(), step
    while settings.progress(step, minutes) < 1.0:
        if stop_after is not None and step - first >= stop_after:
            save()
            return False
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step, settings.progress(step, minutes))
        value, figures = loss(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
        optimizer.step()
        step += 1
        _update(average, module, min(settings.ema, (1 + step) / (10 + step)))
        minutes = (time.monotonic() - begun) / 60
        if time.monotonic() - reported > 15:
            speed = (step - seen) * settings.batch / (time.monotonic() - reported)
            told = ", ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
            done = settings.progress(step, minutes)
            log.info("%s: step %d (%.0f %%), %s, %.1f samples/s", checkpoint.stem, step, 100 * done, told, speed)
            reported, seen = time.monotonic(), step
        if step % save_every == 0:
            save()
    save()
    module.load_state_dict({name: average[name].to(value.dtype) for name, value in module.state_dict().items()})
    module.eval()
    return True


@torch.no_grad()
def _update(average: dict[str, torch.Tensor], module: nn.Module, decay: float) -> None:
    state = module.state_dict()
    floats = [(average[name], value) for name, value in state.items() if value.is_floating_point()]
    torch._foreach_mul_([a for a, _ in floats], decay)
    torch._foreach_add_([a for a, _ in floats], [value.float() for _, value in floats], alpha=1 - decay)
