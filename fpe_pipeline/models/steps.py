"""Steps: where a sampling run is, and the part of it in which an edit is active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

__all__ = ["Step", "StepWindow", "locate_step", "run_steps", "step_of_scheduler"]


@dataclass(frozen=True)
class Step:
    """Step ``index`` (from 0, noisiest first) of a run of ``total`` steps.

    Some schedulers call the model more than once a step: PNDM for its first step, Heun and KDPM2 for all but the last.
    Windows are fractions of the steps that the user asked for, whatever the scheduler makes of them.

    Args:
        index: of the step.
        total: steps of the run, as the user asked for them.
        call: which call of the model it is, from 0; default: ``index``.
        calls: calls of the run; default: ``total``.
    """

    index: int
    total: int
    call: int = -1
    calls: int = -1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.total:
            raise ValueError(f"expected a step with 0 <= index < total, got index {self.index} of {self.total}")
        for name, default in (("call", self.index), ("calls", self.total)):
            if getattr(self, name) < 0:
                object.__setattr__(self, name, default)  # the way to do it in a frozen dataclass

    def place(self, compat: str | None = None) -> int:
        """Where windows look for it: the step; with ``"original"`` the call, which is what the authors' code counts
        (its fractions are of ``total`` all the same)."""
        return self.index if compat is None else self.call


@dataclass(frozen=True)
class StepWindow:
    """The steps with ``int(total * start) <= index < int(total * stop)``.

    The truncation is Free-Prompt-Editing's and Prompt-to-Prompt's, floating point included:
    ``int(50 * 0.58)`` is 28.

    Args:
        start, stop: fractions of the run, from 0 to 1.
    """

    start: float
    stop: float

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            fraction = _fraction(getattr(self, name))
            # Written so that NaN, which compares false with everything, fails too.
            if not 0.0 <= fraction <= 1.0:
                raise ValueError(f"expected the window's {name} to be a fraction of the run in [0, 1], got {fraction}")
            object.__setattr__(self, name, fraction)
        if self.start > self.stop:
            raise ValueError(f"expected a window with start <= stop, got ({self.start}, {self.stop})")

    @classmethod
    def parse(cls, value: Any) -> StepWindow:
        """A window from a number ``s``, meaning ``(0, s)``, or from a pair ``(a, b)``.

        Args:
            value: int, float, NumPy or torch scalar; or a list, tuple or array of two of these.

        Raises:
            ValueError: anything else, NaN, a fraction outside [0, 1], or ``a > b``.
        """
        if isinstance(value, StepWindow):
            return value
        if hasattr(value, "tolist"):  # NumPy and torch scalars and arrays
            value = value.tolist()
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != 2:
                raise ValueError(f"expected a number s or a pair (start, stop), got {len(value)} values: {value!r}")
            return cls(*value)
        return cls(0.0, value)

    def steps(self, total: int) -> range:
        """The active steps of a run of ``total`` steps."""
        return range(int(total * self.start), int(total * self.stop))

    def holds(self, step: Step, compat: str | None = None) -> bool:
        """Whether a step is among them; with ``compat="original"``, whether a call of the model is."""
        return step.place(compat) in self.steps(step.total)

    def __contains__(self, step: Step) -> bool:
        return self.holds(step)


def _fraction(value: Any) -> float:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"expected a fraction of the run in [0, 1], got {value!r} of type {type(value).__name__}")
    return float(value)


def locate_step(scheduler: Any, timestep: Any) -> Step:
    """Which step of ``scheduler``'s schedule a call of the model belongs to, read from the timestep it is given.

    Counting calls would break on samplers that call the model several times a step, and on the second run. A run that
    starts part-way (image-to-image with a strength) keeps its place in the whole schedule: windows are about noise.

    Args:
        scheduler: a diffusers scheduler whose ``set_timesteps`` has run.
        timestep: what the model receives: a number or a tensor with one value.

    Raises:
        ValueError: no schedule yet, or a timestep that is not in it.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        raise ValueError(
            f"{type(scheduler).__name__} has no timesteps yet: call set_timesteps first, or set the step yourself "
            "with session.step(index, total) before each call of the model"
        )
    call = _index_by_storage(timesteps, timestep)
    if call is None:
        call = _index_by_value(scheduler, timesteps, timestep)
    return _step_of_call(scheduler, call, len(timesteps))


def step_of_scheduler(scheduler: Any, timestep: torch.Tensor | None = None) -> Step:
    """The step that ``scheduler`` is at, for models whose timestep is not the scheduler's own.

    Args:
        scheduler: a diffusers scheduler whose ``set_timesteps`` has run.
        timestep: what the model receives, where that is the scheduler's own: it says where a run starts of which the
            scheduler was told nothing. Of several numbers the largest is meant; the others are of what is known.

    Raises:
        ValueError: no schedule yet, one whose steps are over, or a first timestep that is not in it.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    calls = 0 if timesteps is None else len(timesteps)
    call = getattr(scheduler, "step_index", None)
    if call is None:  # before its first step
        call = getattr(scheduler, "begin_index", None)
    if call is None:
        call = 0 if timestep is None or not calls else _index_by_value(scheduler, timesteps, timestep.max())
    if call >= calls:
        raise ValueError(
            f"{type(scheduler).__name__} is at step {call} of {calls}: call set_timesteps first, and in a sampling "
            "loop of your own session.step(index, total) before each call of the model"
        )
    return _step_of_call(scheduler, call, calls)


def run_steps(scheduler: Any) -> tuple[Step, ...]:
    """The step of each call of the model, of a scheduler whose ``set_timesteps`` has run."""
    calls = len(scheduler.timesteps)
    return tuple(_step_of_call(scheduler, call, calls) for call in range(calls))


def _step_of_call(scheduler: Any, call: int, calls: int) -> Step:
    """The user's step that a call of the model belongs to.

    With N steps, Heun and KDPM2 call twice a step but the last: 2N - 1. PNDM's first step is made by two calls (N + 1),
    or its first three by four each (Runge-Kutta, N + 9).
    """
    total = getattr(scheduler, "num_inference_steps", None)
    if type(scheduler).__name__ == "SCMScheduler":  # whose schedule ends with a time at which there is nothing to do
        calls -= 1
    said = getattr(scheduler, "steps_of_calls", ())  # by our own schedulers of flow models
    if said and total is not None:
        return Step(said[call], total, call, calls)
    if total is None or total == calls:
        return Step(call, calls)
    runge_kutta = getattr(scheduler, "prk_timesteps", None)
    if runge_kutta is not None and len(runge_kutta):
        first = len(runge_kutta)
        index = call // 4 if call < first else call - first + first // 4
    elif runge_kutta is not None and calls == total + 1:
        index = max(call - 1, 0)
    elif getattr(scheduler, "order", 1) == 2 and calls == 2 * total - 1:
        index = call // 2
    else:  # such as DDPM's with timesteps of the user's own, which keeps the number of an earlier run
        return Step(call, calls)
    return Step(min(index, total - 1), total, call, calls)


def _index_by_storage(timesteps: Any, timestep: Any) -> int | None:
    """``for t in scheduler.timesteps`` hands out views: their offset is the position.

    That is exact where a schedule repeats a timestep (PNDM, Heun), and it reads nothing from the device.
    """
    if not (isinstance(timestep, torch.Tensor) and isinstance(timesteps, torch.Tensor)):
        return None
    if timestep.device != timesteps.device or timestep.dtype != timesteps.dtype or timesteps.dim() != 1:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    # `t.expand(batch)` keeps the offset and has stride 0; a slice of several timesteps is not one step.
    if any(size > 1 and stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True)):
        return None
    offset = int(timestep.storage_offset()) - int(timesteps.storage_offset())
    index, remainder = divmod(offset, int(timesteps.stride(0)))
    return index if remainder == 0 and 0 <= index < len(timesteps) else None


def _index_by_value(scheduler: Any, timesteps: Any, timestep: Any) -> int:
    values = torch.as_tensor(timesteps).tolist()
    given = torch.as_tensor(timestep).flatten().unique().tolist()
    if len(given) != 1:
        raise ValueError(
            f"expected one timestep for the whole batch, got {given}: rows at different steps have no common step; "
            "set it with session.step(index, total)"
        )
    # A pipeline may cast a float timestep to the latents' dtype on the way to the model, so compare in that dtype.
    dtype = timestep.dtype if isinstance(timestep, torch.Tensor) else torch.float64
    cast = torch.as_tensor(values, dtype=torch.float64).to(dtype).tolist()
    matches = [index for index, value in enumerate(cast) if value == given[0]]
    if not matches:
        raise ValueError(
            f"timestep {given[0]} is not among the scheduler's {len(values)} timesteps ({values[0]} … {values[-1]}): "
            "in a sampling loop of your own, call session.step(index, total) before each call of the model; around "
            "calls that are not to be edited, such as an inversion, use `with session.paused():`"
        )
    # Schedulers that repeat a timestep know where they are.
    for known in (getattr(scheduler, "step_index", None), getattr(scheduler, "counter", None)):
        if len(matches) > 1 and known in matches:
            return int(known)
    return matches[0]
