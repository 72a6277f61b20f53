"""What happens at the end of each sampling step: the user's callback, then what the pipeline needs done.

diffusers' loop hands its tensors to one callback and takes changed ones back. `StepEnd` is that callback; the tasks
are pure of one another and run in the order given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..edits import Edit
from ..models.steps import run_steps
from ..session.hooks import SchedulerHook
from ..session.session import session_of

__all__ = [
    "Call",
    "DropSource",
    "FollowEmbeddings",
    "StepEnd",
    "Task",
    "check_source_can_be_dropped",
    "told_of_steps",
]


@dataclass
class Call:
    """What the pipeline's extension points need to know of the call that they serve."""

    prompts: int
    images_per_prompt: int
    generators: list[torch.Generator] = field(default_factory=list)
    source_dropped: bool = False


class Task(Protocol):
    """Something to do at the end of step ``index``; it changes ``tensors`` in place."""

    def __call__(self, pipe: Any, index: int, tensors: dict[str, Any]) -> None: ...


class StepEnd:
    """diffusers' ``callback_on_step_end``: the user's, which sees what it asked for, and then ours.

    Args:
        callback: the user's, or None.
        tensor_inputs: the names that it asked for.
        tasks: run after it, in order.
        names: every tensor that the loop offers.
    """

    def __init__(
        self,
        callback: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None,
        tensor_inputs: Sequence[str],
        tasks: Sequence[Task],
        names: Sequence[str],
    ) -> None:
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            tensor_inputs = callback.tensor_inputs
        self._callback = callback
        self._asked = tuple(tensor_inputs)
        self._tasks = tuple(tasks)
        self.tensor_inputs = list(dict.fromkeys([*tensor_inputs, *names]))

    def __call__(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        changed = dict(tensors)
        if self._callback is not None:
            changed |= self._callback(pipe, index, timestep, {name: tensors[name] for name in self._asked})
        for task in self._tasks:
            task(pipe, index, changed)
        return changed


class FollowEmbeddings:
    """Give every step its own unconditional embedding, from [steps, 1, tokens, channels]."""

    def __init__(self, unconditional: torch.Tensor) -> None:
        self._unconditional = unconditional

    def __call__(self, pipe: Any, index: int, tensors: dict[str, Any]) -> None:
        if index + 1 < len(self._unconditional) and pipe.do_classifier_free_guidance:
            conditional = tensors["prompt_embeds"].chunk(2)[1]
            following = self._unconditional[index + 1].to(conditional).expand_as(conditional)
            tensors["prompt_embeds"] = torch.cat([following, conditional])


class DropSource:
    """Remove the source rows at the last step that needs them: from the loop, the step noise and the scheduler."""

    def __init__(self, call: Call, edit: Edit) -> None:
        self._call = call
        self._edit = edit

    def __call__(self, pipe: Any, index: int, tensors: dict[str, Any]) -> None:
        last = max((step.call for step in run_steps(pipe.scheduler) if self._edit.active(step)), default=0)
        if index != last:
            return
        rows, first = tensors["latents"].shape[0], self._call.images_per_prompt
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and tensor.shape[0] % rows == 0:  # unconditional rows, then conditional
                tensors[name] = torch.cat([half[first:] for half in tensor.split(rows)])
        for name, value in vars(pipe.scheduler).items():
            setattr(pipe.scheduler, name, _without_rows(value, rows, first))
        del self._call.generators[:first]
        self._call.source_dropped = True
        session = session_of(pipe)
        if session is not None:
            session.source_dropped()


@contextmanager
def told_of_steps(pipe: Any, callback: Any, tensor_inputs: Sequence[str]) -> Iterator[None]:
    """Make up ``callback_on_step_end``, for latents alone, in a block around a loop of diffusers that has none.

    The scheduler's steps tell it of them, after whatever else holds or blends their latents.

    Args:
        pipe: whose loop.
        callback: as diffusers' loops take it; None for nothing.
        tensor_inputs: the names of the tensors that it asks for.

    Raises:
        ValueError: other names than latents.
    """
    tensor_inputs = getattr(callback, "tensor_inputs", tensor_inputs)  # a callback of diffusers says what it needs
    if set(tensor_inputs) - set(pipe._callback_tensor_inputs):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs must be among {pipe._callback_tensor_inputs}, got {tensor_inputs}: "
            f"{pipe.parent.__name__}'s loop keeps {pipe.kept_in_loop} to itself, leave them out"
        )
    steps = itertools.count()

    def end(latents: torch.Tensor, timestep: Any) -> torch.Tensor:
        given = dict.fromkeys(tensor_inputs, latents)
        changed: torch.Tensor = callback(pipe, next(steps), timestep, given).get("latents", latents)
        return changed

    hook = None if callback is None else SchedulerHook(pipe.scheduler, end, every_call=True)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove(expected=False)


def check_source_can_be_dropped(pipe: Any, prompts: int, options: dict[str, Any]) -> None:
    """Raise where keep_source=False would leave source rows behind that the parent gives no access to."""
    hint = "use keep_source=True"
    if pipe.kept_in_loop is not None:
        raise ValueError(
            f"keep_source=False cannot drop the source's rows from {pipe.parent.__name__}'s loop, which keeps "
            f"{pipe.kept_in_loop} to itself: {hint}"
        )
    if prompts == 1:
        raise ValueError("keep_source=False needs at least one target prompt beside the source, got none")
    if options.get("ip_adapter_image") is not None or options.get("ip_adapter_image_embeds") is not None:
        raise ValueError(f"keep_source=False cannot drop the source's image embeddings of an IP-Adapter; {hint}")
    unet = getattr(pipe, "unet", None)
    if unet is not None and unet.config.time_cond_proj_dim is not None:
        raise ValueError(f"keep_source=False cannot drop the source's guidance embedding of this UNet; {hint}")
    if hasattr(pipe.scheduler, "noise_sampler"):
        raise ValueError(
            f"keep_source=False would change the noise that {type(pipe.scheduler).__name__} adds, which it draws "
            f"for all rows at once; {hint} or a scheduler without a noise sampler"
        )


def _without_rows(value: Any, rows: int, first: int) -> Any:
    """A scheduler's attribute without the first rows of what it remembers of each image: tensors of `rows` in 4-D, or
    in 3-D where latents are packed into tokens."""
    if isinstance(value, torch.Tensor) and value.ndim in (3, 4) and value.shape[0] == rows:
        return value[first:]
    if isinstance(value, list) and any(isinstance(item, torch.Tensor) for item in value):
        return [_without_rows(item, rows, first) for item in value]
    return value
