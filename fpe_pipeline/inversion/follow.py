"""A run that follows an inverted image: what the inversion decides of it, and how its source is held."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.steps import locate_step
from ..sampling.step_end import Call, FollowEmbeddings, Task
from ..session.hooks import SchedulerHook
from .trajectory import Inversion

__all__ = ["FollowInversion", "Followed", "check_inversion_options"]

#: By method that leaves the source free, options by which its steps would lead elsewhere. Where the source's own prompt
#: stands in for the empty one guidance cancels, rescaled or not; but layers are skipped of the prompt alone.
_MOVING = {"null-text": ("eta", "clip_skip", "guidance_rescale"), "negative-prompt": ("eta", "clip_skip")}


def check_inversion_options(
    inversion: Inversion,
    given: dict[str, Any],
    negative_prompt: Any,
    num_inference_steps: int | None,
    *,
    is_flow: bool = False,
) -> None:
    """Raise where an option would contradict what an inversion decides, or where it is of the other kind of model."""
    if not isinstance(inversion, Inversion):
        raise TypeError(f"expected what pipe.invert returns as inversion, got {type(inversion).__name__}")
    if inversion.schedule.is_flow is not is_flow:
        where = ("transformer that solves a flow", "UNet")
        raise ValueError(
            f"the image was inverted by {inversion.method!r} with {inversion.schedule.scheduler}, on a "
            f"{where[is_flow]}, and this pipeline has a {where[not is_flow]}: invert the image again with it"
        )
    taken = ["latents", "timesteps", "sigmas", "mu", "std"]
    if inversion.unconditional is not None or inversion.method == "negative-prompt":
        taken += ["negative_prompt_embeds", "negative_prompt_2", "negative_pooled_prompt_embeds"]
        taken += ["max_sequence_length", "clean_caption"]  # the source's prompt is to be encoded as it was
        if negative_prompt is not None:
            raise ValueError(
                f"{inversion.method!r} inversion puts its own embeddings in place of the negative prompt; leave "
                "negative_prompt out, or invert by 'ddim' or 'direct'"
            )
    clashing = [name for name in taken if given.get(name) is not None]
    if clashing:
        raise ValueError(f"the inversion decides {', '.join(clashing)}; leave out one or the other")
    moving = [name for name in _MOVING.get(inversion.method, ()) if given.get(name)]
    if moving:
        raise ValueError(
            f"{inversion.method!r} inversion leaves the source free, and what comes out of it is the image as long as "
            f"it is denoised as it was inverted, which {', '.join(moving)} would change: leave that out, or invert by "
            "'ddim' or 'direct', which put the source back onto the image's latents"
        )
    if num_inference_steps not in (None, inversion.steps):
        raise ValueError(
            f"the image was inverted in {inversion.steps} steps, got num_inference_steps={num_inference_steps}; "
            "leave it out, or invert with that number"
        )


class FollowInversion:
    """Puts the source rows of a run back onto the stored latents of an inverted image, in a ``with`` block.

    It acts before anything else sees the step's latents: blends take from the source what the next step starts from.

    Args:
        scheduler: of the run.
        call: which rows are the source's.
        inversion: says after which steps the source is put where.
    """

    def __init__(self, scheduler: Any, call: Call, inversion: Inversion) -> None:
        self._scheduler, self._call, self._inversion = scheduler, call, inversion

    def __enter__(self) -> None:
        self._hook = SchedulerHook(self._scheduler, self._follow)

    def __exit__(self, *_: Any) -> None:
        self._hook.remove(expected=False)

    def _follow(self, latents: torch.Tensor, timestep: Any) -> torch.Tensor:
        reference = self._inversion.reference(locate_step(self._scheduler, timestep).index)
        if reference is None or self._call.source_dropped:
            return latents
        rows = self._call.images_per_prompt
        return torch.cat([reference.to(latents).expand(rows, *reference.shape[1:]), latents[rows:]])


@dataclass(frozen=True)
class Followed:
    """What a run needs to follow an inverted image; nothing where its source is generated.

    Args:
        source: holds the source rows to the trajectory, in a ``with`` block around the run.
        tasks: at the end of each step.
        options: of the pipeline's call.
    """

    source: AbstractContextManager[object] = field(default_factory=nullcontext)
    tasks: tuple[Task, ...] = ()
    options: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, pipe: Any, call: Call, inversion: Inversion | None) -> Followed:
        """How ``call`` of ``pipe`` follows ``inversion``, whose run the scheduler has been set to."""
        if inversion is None:
            return cls()
        source = FollowInversion(pipe.scheduler, call, inversion)
        if inversion.unconditional is None:
            return cls(source)
        options = pipe.unconditional_options(inversion.unconditional[0].expand(call.prompts, -1, -1))
        return cls(source, (FollowEmbeddings(inversion.unconditional),), options)
