"""Who looks whether a run's numbers are finite, step by step, without making a GPU wait to be looked at.

The host learns what a device has computed by waiting for it, and a host that waits after each step cannot prepare the
next one meanwhile. So a CUDA device is asked at each step and heard a step or two later, at the latest before a picture
is made of the latents, when another run begins and when the session ends. What is wrong is told of the step at which
it began all the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..models.adapters.adapter import identity
from ..models.adapters.families import edited_model
from ..models.steps import locate_step
from .finite import can_be_asked, first_bad_layer, is_finite, refuse_step
from .hooks import SchedulerHook

__all__ = ["FiniteDecoder", "FiniteSteps", "FiniteWatch"]

#: Steps that a host may be ahead of what it has heard.
AHEAD = 2


class Question:
    """A tensor's largest magnitude, on its way from a CUDA device to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        largest = magnitude(tensor)
        self._largest = torch.empty((), dtype=largest.dtype, pin_memory=True)
        self._largest.copy_(largest, non_blocking=True)
        self._arrival = torch.cuda.Event()
        self._arrival.record(torch.cuda.current_stream(tensor.device))

    @property
    def is_answered(self) -> bool:
        """Whether it is there."""
        return bool(self._arrival.query())

    def answer(self) -> float:
        """The magnitude, waited for where it is not there yet."""
        self._arrival.synchronize()
        return float(self._largest)


class _Asked(NamedTuple):
    question: Question
    refuse: Callable[[], None]


class FiniteWatch:
    """Looks at one tensor after the other, in the order in which they are shown."""

    def __init__(self) -> None:
        self._asked: deque[_Asked] = deque()

    def look(self, tensor: Any, refuse: Callable[[], None], *, wait: bool = False) -> None:
        """Call ``refuse``, now or later, where a tensor holds numbers that are not finite.

        Args:
            tensor: anything, a list of tensors too; what is none of these is passed over.
            refuse: raises, with what it needs of the run as it is now; held until the tensor was heard of.
            wait: hear of it now, whatever the device.
        """
        if isinstance(tensor, list) and tensor and all(map(can_be_asked, tensor)):
            tensor = torch.cat([each.flatten() for each in tensor])
        if not can_be_asked(tensor):
            return
        if wait or not is_late(tensor):
            self.settle()
            if not is_finite(tensor):
                refuse()
            return
        self._asked.append(_Asked(Question(tensor), refuse))
        while self._asked and (len(self._asked) > AHEAD or self._asked[0].question.is_answered):
            self._hear()

    def settle(self) -> None:
        """Hear of everything that was asked."""
        while self._asked:
            self._hear()

    def forget(self) -> None:
        """Hear of nothing more."""
        self._asked.clear()

    def _hear(self) -> None:
        question, refuse = self._asked.popleft()
        if not math.isfinite(question.answer()):
            self.forget()  # what came after it came of it
            refuse()


def is_late(tensor: torch.Tensor) -> bool:
    """Whether the host would have to wait for a tensor's numbers."""
    return tensor.is_cuda and tensor.is_floating_point()


def magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of a tensor's numbers, NaN where one is, in one pass: finite only if all of them are."""
    largest: torch.Tensor = torch.linalg.vector_norm(tensor.detach(), ord=math.inf)
    return largest


class FiniteDecoder:
    """Raises where the decoder of a pipeline's autoencoder gives values that are not finite, until it is removed.

    Args:
        pipe: whose decoder; nothing happens where it has none.
        watch: of the latents, which is heard first.
    """

    def __init__(self, pipe: Any, watch: FiniteWatch) -> None:
        self._watch = watch
        decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
        self._handle = None
        if isinstance(decoder, torch.nn.Module):
            self._handle = decoder.register_forward_hook(self._check, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _check(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._watch.settle()
        if is_finite(output):
            return
        layer, _ = first_bad_layer(module, args, kwargs)
        raise FloatingPointError(
            "the autoencoder makes values that are not finite of latents that are"
            + ("" if layer is None else f", first in decoder.{layer}")
            + ": decode in another dtype, such as pipe.vae.to(torch.float32) or bfloat16 (float16 ends at 65504)"
        )


class FiniteSteps:
    """Watches a pipeline call that is in no session, in a ``with`` block."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def __enter__(self) -> None:
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._watch = FiniteWatch()
        self._decoder = FiniteDecoder(self._pipe, self._watch)
        self._steps = SchedulerHook(self._pipe.scheduler, self._check)
        keep = torch.compiler.disable(self._keep)
        self._model = edited_model(self._pipe)[1]
        self._handle = self._model.register_forward_pre_hook(keep, with_kwargs=True)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self._watch.settle()
        finally:
            self._watch.forget()
            self._handle.remove()
            self._steps.remove(expected=False)
            self._decoder.remove()

    def _keep(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = args, kwargs

    def _check(self, latents: torch.Tensor, timestep: Any) -> torch.Tensor:
        pipe, call, guidance = self._pipe, self._call, getattr(self._pipe, "guidance_scale", None)

        def refuse() -> None:
            refuse_step(locate_step(pipe.scheduler, timestep), identity(self._model), *call, guidance)

        self._watch.look(latents, refuse)
        self._call = (), {}
        return latents
