"""Everything that a session hangs on a pipeline besides its UNet, put on and taken off together."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..prompts.encoding import Encoding, EncodingHook
from .finite import FiniteDecoder
from .hooks import SchedulerHook
from .shared_noise import paired_generators

__all__ = ["PipelineHooks"]


class PipelineHooks:
    """Hands on a pipeline's prompts, its latents after every step, and the noise that it draws.

    Args:
        pipe: a diffusers pipeline.
        encoded: is shown what the pipeline encodes.
        stepped: takes the scheduler's new latents with the timestep and returns those to go on from.
        paired: the sources of the call's prompts and its images a prompt, where rows of one image are to draw the same
            noise; None where rows draw their own.
        text_parts: of the text tokens of its transformer, as the adapter says them.
    """

    def __init__(
        self,
        pipe: Any,
        encoded: Callable[[Encoding], None],
        stepped: Callable[[torch.Tensor, Any], torch.Tensor],
        paired: Callable[[], tuple[Sequence[int], int] | None],
        text_parts: Sequence[tuple[str, tuple[str, ...]]] = (),
    ) -> None:
        self._encoding = EncodingHook(pipe, encoded, text_parts)
        self._decoder = FiniteDecoder(pipe)
        self._noise = _PairedNoise(pipe, paired)
        has_steps = hasattr(getattr(pipe, "scheduler", None), "step")
        self._scheduler = SchedulerHook(pipe.scheduler, stepped) if has_steps else None

    def remove(self, *, expected: bool) -> None:
        """Leave the pipeline as it was found; warn where steps of its scheduler were ``expected`` and none was made."""
        self._encoding.remove()
        self._decoder.remove()
        self._noise.remove()
        if self._scheduler is not None:
            self._scheduler.remove(expected=expected)


class _PairedNoise:
    """Rows of one image draw the same noise: at the start, where no latents are given, and in every stochastic step."""

    def __init__(self, pipe: Any, paired: Callable[[], tuple[Sequence[int], int] | None]) -> None:
        self._pipe, self._paired = pipe, paired
        self._generators: list[torch.Generator] | None = None
        self._shadows: list[tuple[str, Any, Any]] = []
        for name, around in (("prepare_latents", self._latents), ("prepare_extra_step_kwargs", self._options)):
            original = getattr(pipe, name, None)
            if original is not None:
                shadow = functools.wraps(original)(functools.partial(around, original, inspect.signature(original)))
                self._shadows.append((name, vars(pipe).get(name), shadow))
                setattr(pipe, name, shadow)

    def remove(self) -> None:
        for name, shadowed, shadow in self._shadows:
            if vars(self._pipe).get(name) is shadow:
                delattr(self._pipe, name)
                if shadowed is not None:
                    setattr(self._pipe, name, shadowed)
        self._shadows = []

    def _latents(self, original: Any, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        layout, generator = self._paired(), given.arguments.get("generator")
        self._generators = None
        draws = "generator" in signature.parameters and given.arguments.get("latents") is None
        if draws and layout is not None and not isinstance(generator, list):  # a list says every row's own
            self._generators = given.arguments["generator"] = paired_generators(generator, *layout)
            image = given.arguments.get("image")
            if isinstance(image, torch.Tensor) and len(self._generators) % max(image.shape[0], 1) == 0:
                # Some pipelines look for a generator's own image, and find none where a picture stands for all rows.
                given.arguments["image"] = image.repeat(len(self._generators) // image.shape[0], 1, 1, 1)
        return original(*given.args, **given.kwargs)

    def _options(self, original: Any, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        options = original(*args, **kwargs)
        if self._generators is not None and "generator" in options:
            options["generator"] = self._generators
        return options
