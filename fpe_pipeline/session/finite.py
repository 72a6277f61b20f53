"""Values that are not finite stop a run, which says where they began: they must never become a picture.

What is watched costs one number a step; the layer is looked for only once something is wrong, by computing again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from ..models.adapter import identity, model_inputs
from ..models.families import edited_model
from ..models.steps import Step, locate_step

__all__ = ["FiniteDecoder", "FiniteSteps", "check_latents", "first_bad_layer", "is_finite", "refuse_step"]

_ADVICE = "lower the guidance scale or the edit's weights, or compute in another dtype (float16 ends at 65504)"


def is_finite(tensor: Any) -> bool:
    """Whether all numbers of a tensor are finite; True where that cannot be asked, in a graph that is being made."""
    if not isinstance(tensor, torch.Tensor) or torch.compiler.is_compiling():
        return True
    if tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True
    return bool(torch.isfinite(tensor).all())


def check_latents(latents: torch.Tensor | None) -> None:
    """Raise ValueError for latents to start from that are not finite."""
    if latents is not None and not is_finite(latents):
        raise ValueError("the latents to start from hold values that are not finite")


def refuse_step(
    step: Step | None,
    model: torch.nn.Module | None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    guidance_scale: Any = None,
) -> None:
    """Raise FloatingPointError for a step whose result is not finite.

    Args:
        step: which.
        model: as it is set up for the step, to be called once more; None where it was not seen.
        args, kwargs: of its call.
        guidance_scale: of the run, where it is known.
    """
    when = "" if step is None else f" from step {step.index} of {step.total} on"
    sample, conditions = model_inputs(args, kwargs or {})
    guided = "" if guidance_scale is None else f" (guidance_scale={guidance_scale:g})"
    word = "transformer" if "Transformer" in type(model).__name__ else "UNet"
    if not is_finite(sample):
        reason = f"the {word} got latents that are not finite"
    elif not is_finite(conditions):
        reason = f"the {word} got text embeddings that are not finite"
    else:
        layer = None if model is None else first_bad_layer(model, args, kwargs or {})
        if layer is not None:
            reason = f"the first such layer is {layer}"
        elif model is not None:
            reason = f"the {word}'s prediction is finite, and what guidance{guided} and the scheduler make of it is not"
        else:
            reason = f"what the {word}, guidance{guided} and the scheduler make of the latents is not"
    raise FloatingPointError(f"the latents are not finite{when}: {reason}; {_ADVICE}")


def first_bad_layer(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The first module, in the order of computation, whose output is not finite; None where there is none."""
    found: list[str] = []
    handles = []

    def look(path: str, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        if not found and not is_finite(values):
            found.append(path)

    for path, part in module.named_modules():
        if path:
            hook = torch.compiler.disable(lambda module, given, output, path=path: look(path, output))
            handles.append(part.register_forward_hook(hook))
    try:
        # Whatever goes wrong here, what went wrong before is what has to be told.
        with torch.no_grad(), contextlib.suppress(Exception):
            module.forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


class FiniteDecoder:
    """Raises where the decoder of a pipeline's autoencoder gives values that are not finite, until it is removed."""

    def __init__(self, pipe: Any) -> None:
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
        if is_finite(output):
            return
        layer = first_bad_layer(module, args, kwargs)
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
        from .hooks import SchedulerHook

        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._decoder = FiniteDecoder(self._pipe)
        self._steps = SchedulerHook(self._pipe.scheduler, self._check)
        keep = torch.compiler.disable(self._keep)
        self._model = edited_model(self._pipe)[1]
        self._handle = self._model.register_forward_pre_hook(keep, with_kwargs=True)

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()
        self._steps.remove(expected=False)
        self._decoder.remove()

    def _keep(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = args, kwargs

    def _check(self, latents: torch.Tensor, timestep: Any) -> torch.Tensor:
        if not is_finite(latents):
            step = locate_step(self._pipe.scheduler, timestep)
            refuse_step(step, identity(self._model), *self._call, getattr(self._pipe, "guidance_scale", None))
        self._call = (), {}
        return latents
