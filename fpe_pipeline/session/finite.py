"""Values that are not finite stop a run, which says where they began: they must never become a picture.

What is watched costs one number a step; the layer is looked for only once something is wrong, by computing again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from ..models.adapters.adapter import model_inputs
from ..models.steps import Step

__all__ = ["can_be_asked", "check_latents", "first_bad_layer", "is_finite", "refuse_step"]

_ADVICE = "lower the guidance scale or the edit's weights, or compute in another dtype (float16 ends at 65504)"


def can_be_asked(tensor: Any) -> bool:
    """Whether a tensor's numbers can be looked at now; False in a graph that is being made."""
    if not isinstance(tensor, torch.Tensor) or torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def is_finite(tensor: Any) -> bool:
    """Whether all numbers of a tensor, or of a list of them, are finite; True where that cannot be asked."""
    if isinstance(tensor, list):  # of rows that may differ in length
        return all(map(is_finite, tensor))
    return not can_be_asked(tensor) or bool(torch.isfinite(tensor).all())


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
        layer, is_computed = (None, False) if model is None else first_bad_layer(model, args, kwargs or {})
        if layer is not None:
            reason = f"the first such layer is {layer}"
        elif is_computed:
            reason = f"the {word}'s prediction is finite, and what guidance{guided} and the scheduler make of it is not"
        else:
            reason = f"what the {word}, guidance{guided} and the scheduler make of the latents is not"
    raise FloatingPointError(f"the latents are not finite{when}: {reason}; {_ADVICE}")


def first_bad_layer(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str | None, bool]:
    """The first module, in the order of computation, whose output is not finite, found by computing once more.

    Returns:
        its path, None where there is none; and whether the computation came to its end.
    """
    found: list[str] = []
    handles = []
    is_computed = False

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
            is_computed = True
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None, is_computed
