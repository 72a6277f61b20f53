"""A run that is watched: how far it is, what the pictures look like so far, and the wish to end it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..runs.progress import Progress

__all__ = ["Cancelled", "Told", "Watched", "watch"]

#: Share of a run's time that its previews may take.
_SHARE = 0.15
_TURN = 0.1  # seconds between two looks at whether the visitor is still there


class Cancelled(Exception):
    """The visitor does not want the rest of a run."""


@dataclass(frozen=True)
class Told:
    """How far a run has come.

    Args:
        title: of the stage.
        done, total: its steps.
        left: seconds until the stage ends, as its steps went so far; None before the second step.
        preview: the targets so far.
    """

    title: str
    done: int
    total: int
    left: float | None = None
    preview: tuple[Image.Image, ...] = ()

    def __str__(self) -> str:
        left = "" if self.left is None else f", {self.left:.0f} s left"
        return f"{self.title}: step {self.done} of {self.total}{left}"


class Watched(Progress):
    """What a run tells its progress to; it ends the run at the step after :meth:`cancel`."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._begun, self._first, self._spent = 0.0, 0, 0.0
        self._start = time.monotonic()
        self._preview: tuple[Image.Image, ...] = ()

    def cancel(self) -> None:
        """End the run at its next step."""
        self._cancelled.set()

    def tell(self, title: str, done: int, total: int) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        now = time.monotonic()
        if done == 0:
            self._begun = now
        left = (now - self._begun) / done * (total - done) if done > 1 else None
        self.told.put(Told(title, done, total, left, self._preview))

    def on_step(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """``callback_on_step_end``: decode what there is so far, as long as that takes a small share of the time."""
        begun = time.monotonic()
        if self._spent <= _SHARE * (begun - self._start):
            self._preview = _decoded(pipe, tensors["latents"][1:])
            self._spent += time.monotonic() - begun
        return {}


def watch(work: Callable[[Watched], Any], watched: Watched) -> Iterator[Told | Any]:
    """Do some work in a thread of its own; yield what it tells, and last what it returns.

    Where the reader stops reading, the work is cancelled and waited for: no run goes on that nobody looks at.

    Raises:
        Cancelled: it was.
        Exception: whatever the work raised.
    """
    outcome: list[Any] = []

    def worked() -> None:
        try:
            outcome.extend((True, work(watched)))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=worked, name="fpe-run", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            latest = _latest(watched.told)
            if latest is not None:
                yield latest
            thread.join(_TURN)
    finally:
        watched.cancel()
        thread.join()
    done, value = outcome
    if not done:
        raise value
    yield value


def _latest(told: queue.SimpleQueue[Told]) -> Told | None:
    latest = None
    while not told.empty():
        latest = told.get()
    return latest


def _decoded(pipe: Any, latents: Any) -> tuple[Image.Image, ...]:
    """Latents [targets, C, h, w] as pictures."""
    import torch

    with torch.no_grad():
        scaled = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        pixels = pipe.vae.decode(scaled, return_dict=False)[0]
    values = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return tuple(Image.fromarray(np.ascontiguousarray(value)) for value in values)
