"""One training loop for every network here: seeded by step, resumable, aware of the time it may take.

On a CUDA device a step is one CUDA graph: the network computes in bfloat16, its float32 parameters, both moments and
the moving average are one vector each, and nothing waits for the device but the clock.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ... import endings
from ...atomic_folder import replaced
from .presets import Fit
from .step import OptimiserStep, Weights

__all__ = ["Fit", "Fitted", "fit"]

log = logging.getLogger(__name__)

_REPORT_SECONDS, _SAVE_SECONDS = 10.0, 30.0
_LOST = 20  # steps in a row without a finite gradient: single ones are left out, so many end a training
_AHEAD = 2  # steps that wait on the device: it never idles, and the clock is never far from what it did


@dataclass(frozen=True)
class Fitted:
    """What a call of :func:`fit` did.

    Args:
        finished: whether the training is.
        steps: taken so far, those of earlier calls included.
        minutes: taken so far.
        samples_per_second: of this call, the capture of its graph included; 0 where it took no step.
        figures: the last ones that were reported.
        graphed: whether steps ran as a CUDA graph.
    """

    finished: bool
    steps: int
    minutes: float
    samples_per_second: float
    figures: dict[str, float]
    graphed: bool

    def __bool__(self) -> bool:
        return self.finished


Draw = Callable[[int, torch.Generator], tuple[torch.Tensor, ...]]
Loss = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


def fit(
    module: nn.Module,
    draw: Draw,
    loss: Loss,
    settings: Fit,
    checkpoint: Path | None,
    *,
    seed: int = 0,
    stop_after: int | None = None,
    deadline: float = math.inf,
    on_progress: Callable[[float, Weights], None] | None = None,
) -> Fitted:
    """Train ``module`` in place, continuing from ``checkpoint`` if it exists.

    The random generator of step ``i`` is seeded from ``seed`` and ``i``, so a resumed run draws what an uninterrupted
    one would have drawn and ends with the same weights. Ctrl-C, and a signal that is answered like it, waits for the
    step under way and is raised when the checkpoint is written.

    Args:
        module: what holds every trained parameter, float32; at the end it holds the averaged weights.
        draw: maps (step, generator on the module's device) to the step's inputs, tensors of always the same shapes.
        loss: maps (network, *inputs) to the loss and the figures to report beside it, scalar tensors that stay on the
            device; the network is the module, or its copy in the precision that the device computes in.
        settings: schedule.
        checkpoint: file that is replaced atomically at each save; ``None`` keeps none.
        seed: of the run.
        stop_after: leave after this many steps in this call (the training stays unfinished).
        deadline: of :func:`time.monotonic`: the clock's end where that comes before ``settings.max_minutes``.
        on_progress: called now and then with the fraction done and the weights.

    Returns:
        Whether the training is finished, and how it went.

    Raises:
        ValueError: the checkpoint is damaged, or of another network.
        FloatingPointError: the loss has not been finite for many steps; the checkpoint is of before.
    """
    with endings.put_off() as ended:
        return _fit(module, draw, loss, settings, checkpoint, seed, stop_after, deadline, on_progress, ended)


def _fit(
    module: nn.Module,
    draw: Draw,
    loss: Loss,
    settings: Fit,
    checkpoint: Path | None,
    seed: int,
    stop_after: int | None,
    deadline: float,
    on_progress: Callable[[float, Weights], None] | None,
    ended: Callable[[], bool],
) -> Fitted:
    device = next(module.parameters()).device
    name = checkpoint.stem if checkpoint is not None else type(module).__name__
    state = _State.of(module, checkpoint, name)
    limit = min(settings.max_minutes, state.minutes + max(0.0, (deadline - time.monotonic()) / 60))
    settings = replace(settings, max_minutes=max(limit, 1e-9))
    optimiser = OptimiserStep(state.weights, loss, settings.weight_decay, settings.clip)
    generator = torch.Generator(device)
    clock = _Clock(state.minutes, device)
    first, reported, seen, saved_at = state.step, time.monotonic(), state.step, time.monotonic()
    figures: dict[str, float] = {}
    while not state.finished and (progress := settings.progress(state.step, state.minutes)) < 1.0:
        step = state.step
        if ended() or (stop_after is not None and step - first >= stop_after):
            state.save(optimiser, name, step - first)
            return Fitted(False, step, state.minutes, 0.0, figures, optimiser.graphed)
        inputs = draw(step, generator.manual_seed(seed * 1_000_003 + step))
        optimiser(step, inputs, settings.rate(step, progress), min(settings.ema, (1 + step) / (10 + step)))
        state.step, state.minutes = step + 1, clock.tick()
        now = time.monotonic()
        if now - reported > _REPORT_SECONDS:
            figures = optimiser.figures()
            speed = (state.step - seen) * settings.batch / (now - reported)
            told = _told(figures)
            log.info("%s: step %d (%.0f %%), %s, %.1f samples/s", name, state.step, 100 * progress, told, speed)
            reported, seen = now, state.step
            if on_progress is not None:
                on_progress(progress, state.weights)
        if now - saved_at > _SAVE_SECONDS:
            state.save(optimiser, name, state.step - first)
            saved_at = time.monotonic()
    taken = state.step - first
    state.minutes = clock.end() if taken else state.minutes
    if taken or not state.finished:
        figures = optimiser.figures() if taken else {}
        state.finished = True
        state.save(optimiser, name, taken)
    speed = taken * settings.batch / max(1e-9, clock.seconds) if taken else 0.0
    log.info("%s: %d steps in %.2f minutes, %.1f samples/s, %s", name, state.step, state.minutes, speed, _told(figures))
    state.weights.finish()
    module.eval()
    return Fitted(True, state.step, state.minutes, speed, figures, optimiser.graphed)


@dataclass
class _State:
    """How far a training has come, and the file that keeps it."""

    weights: Weights
    checkpoint: Path | None
    step: int = 0
    minutes: float = 0.0
    finished: bool = False

    @classmethod
    def of(cls, module: nn.Module, checkpoint: Path | None, name: str) -> _State:
        """Where the file has it, else at the beginning."""
        weights = Weights(module)
        if checkpoint is None or not checkpoint.exists():
            return cls(weights, checkpoint)
        try:
            saved = torch.load(checkpoint, map_location=next(module.parameters()).device, weights_only=True)
            place = saved["step"], saved["minutes"], saved["finished"]
            weights.load_state(saved)
        except OSError:
            raise
        except Exception as error:  # of the reader, whatever the file holds
            said = str(error).partition("\n")[0].partition(". ")[0]
            raise ValueError(
                f"'{checkpoint}' is damaged or of another network: {said or type(error).__name__}; delete it to train "
                "this network anew, or choose another work folder"
            ) from error
        log.info("%s: continuing from step %d", name, place[0])
        return cls(weights, checkpoint, *place)

    def save(self, optimiser: OptimiserStep, name: str, taken: int) -> None:
        """Replace the file, but for weights that ``taken`` steps of a call have left as they were."""
        self._check_learns(optimiser.lost(), name, taken)
        if self.checkpoint is None:
            return
        place = {"step": self.step, "minutes": self.minutes, "finished": self.finished}
        with replaced(self.checkpoint) as partial:
            torch.save({**self.weights.state(), **place}, partial)

    def _check_learns(self, lost: int, name: str, taken: int) -> None:
        """Raise `FloatingPointError` where the last `_LOST` steps, or all of fewer, have learnt nothing."""
        if not taken or lost < min(_LOST, taken):
            return
        kept = f"'{self.checkpoint}' is of before" if self.checkpoint and self.checkpoint.exists() else "none was kept"
        raise FloatingPointError(
            f"{name}: the loss or its gradient has not been finite since step {self.step - lost}, nothing is learnt "
            f"any more; of checkpoints, {kept}: go on with a lower learning rate (presets.py), or look at what it is "
            "trained on"
        )


def _told(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


class _Clock:
    """Minutes that a training has taken, by what the device has done rather than by what was asked of it."""

    def __init__(self, minutes: float, device: torch.device) -> None:
        self._before, self._begun, self._cuda = minutes, time.monotonic(), device.type == "cuda"
        self._pending: deque[torch.cuda.Event] = deque()

    @property
    def seconds(self) -> float:
        """Since the clock was made."""
        return time.monotonic() - self._begun

    def tick(self) -> float:
        """One step was asked for; waits where the device lags."""
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
            self._pending.append(event)
            if len(self._pending) > _AHEAD:
                self._pending.popleft().synchronize()
        return self._before + self.seconds / 60

    def end(self) -> float:
        """Wait for everything that was asked for."""
        if self._cuda:
            torch.cuda.synchronize()
        return self._before + self.seconds / 60
