"""Null-text optimisation: an unconditional embedding for each step, such that guided denoising follows a trajectory.

At step i, with the conditional prediction fixed, Adam moves the unconditional embedding ∅ to lessen

    mean (DDIM(z, ∅ + w · (c - ∅)) - z*)²

where z is the latent that the steps before lead to and z* the inversion's latent one step on. The embedding of a step
starts from the one before. The learning rate falls as ``1e-2 · (1 - i / 100)``, and a step ends early below a loss of
``early_stop + i · 2e-5``: those are the authors' numbers.

Source: Mokady et al., "Null-text Inversion for Editing Real Images using Guided Diffusion Models", CVPR 2023.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import check_guidance, check_positive
from ..models.precision import stored_in_float8
from ..sampling.pipeline import SamplingPipeline
from ..sampling.unet_conditions import UNetConditions

__all__ = ["NullText", "optimise_unconditional"]

logger = logging.getLogger(__name__)

LEARNING_RATE = 1e-2
# The falling rate reaches zero at step 100, from where longer runs keep this share of it.
SMALLEST_SHARE = 1e-2
TOLERANCE_GROWTH = 2e-5


@dataclass(frozen=True)
class NullText:
    """Settings of the optimisation: ``pipe.invert(image, prompt, method=NullText(inner_steps=5))``.

    Args:
        guidance_scale: classifier-free guidance of the edits to come; the embeddings hold for this one only.
        inner_steps: at most so many iterations a denoising step.
        early_stop: mean squared error below which the first step ends; later steps are allowed 2e-5 more each.
        gradient_checkpointing: keep the UNet's blocks' inputs only and compute the rest again on the way back: about
            a third more time, and memory that does not grow with the number of layers inside a block.
        on_step: called after each denoising step with its index, the number of steps, iterations and last loss.
    """

    guidance_scale: float = 7.5
    inner_steps: int = 10
    early_stop: float = 1e-5
    gradient_checkpointing: bool = True
    on_step: Callable[[int, int, int, float], None] | None = None

    def __post_init__(self) -> None:
        check_guidance(self.guidance_scale)
        check_positive(inner_steps=self.inner_steps)
        if not self.guidance_scale > 1:
            raise ValueError(
                f"without guidance there is no unconditional half to optimise: guidance_scale must be above 1, "
                f"got {self.guidance_scale}"
            )
        if not isinstance(self.early_stop, Real) or not 0 <= self.early_stop < math.inf:
            raise ValueError(f"early_stop must be a finite number from 0 on, got {self.early_stop!r}")

    def check(self, pipe: SamplingPipeline) -> None:
        """Raise ValueError where gradients through this pipeline's UNet would be of no use."""
        if pipe.denoiser.dtype == torch.float16:
            raise ValueError(
                "null-text optimisation takes gradients through the UNet, which vanish in float16; load the model in "
                "float32 or bfloat16, or invert by 'direct', which optimises nothing"
            )
        if stored_in_float8(pipe.denoiser):
            raise ValueError(
                "null-text optimisation takes gradients through the UNet, whose weights are stored in float8 and cast "
                "back before the gradients need them; load the UNet in float32 or bfloat16, or invert by 'direct', "
                "which optimises nothing"
            )
        if any(parameter.is_inference() for parameter in pipe.denoiser.parameters()):
            raise ValueError(
                "null-text optimisation takes gradients through the UNet, whose weights were made under "
                "torch.inference_mode() and allow none; load the model outside of it, or invert by 'direct'"
            )


def optimise_unconditional(
    pipe: SamplingPipeline, latents: torch.Tensor, conditions: UNetConditions, settings: NullText
) -> torch.Tensor:
    """The unconditional embedding of each step: [steps, 1, tokens, channels], float32, noisiest first.

    Args:
        pipe: its scheduler is set to the run's timesteps.
        latents: [steps + 1, 1, C, h, w], the inversion's trajectory from image to noise.
        conditions: of the image's prompt, guided.
        settings: see `NullText`.
    """
    timesteps = pipe.scheduler.timesteps
    found = []
    sample = latents[-1]
    empty, conditional = conditions.halves()
    start = empty.states
    embedding = start.detach().to(torch.promote_types(start.dtype, torch.float32))
    with _differentiable(pipe.denoiser, settings), pipe.progress_bar(total=len(timesteps)) as bar:
        for index, timestep in enumerate(timesteps):
            with torch.no_grad():
                towards = _predict(pipe, sample, timestep, conditional)
            embedding, iterations, loss = _optimise_step(
                pipe, sample, latents[-2 - index], timestep, towards, empty.with_states(embedding), index, settings
            )
            with torch.no_grad():
                away = _predict(pipe, sample, timestep, empty.with_states(embedding))
                sample = _step(pipe, sample, timestep, away, towards, settings)
            found.append(embedding)
            bar.update()
            logger.debug("null-text step %d: loss %.3g after %d iterations", index, loss, iterations)
            if settings.on_step is not None:
                settings.on_step(index, len(timesteps), iterations, loss)
    return torch.stack(found)


def _optimise_step(
    pipe: SamplingPipeline,
    sample: torch.Tensor,
    wanted: torch.Tensor,
    timestep: torch.Tensor,
    towards: torch.Tensor,
    empty: UNetConditions,
    index: int,
    settings: NullText,
) -> tuple[torch.Tensor, int, float]:
    """(embedding, iterations, last loss) of one denoising step."""
    embedding = empty.states.clone().requires_grad_()
    share = max(1.0 - index / 100.0, SMALLEST_SHARE)
    optimiser = torch.optim.Adam([embedding], lr=LEARNING_RATE * share)
    loss, iterations = float("inf"), 0
    with torch.enable_grad():
        for _ in range(settings.inner_steps):
            away = _predict(pipe, sample, timestep, empty.with_states(embedding))
            reached = _step(pipe, sample, timestep, away, towards, settings)
            error = F.mse_loss(reached.to(embedding.dtype), wanted.to(embedding.dtype))
            optimiser.zero_grad()
            error.backward()
            optimiser.step()
            loss, iterations = error.item(), iterations + 1
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"null-text optimisation gives values that are not finite at step {index}: lower its "
                    "guidance_scale, or compute in another dtype"
                )
            if loss < settings.early_stop + index * TOLERANCE_GROWTH:
                break
    return embedding.detach(), iterations, loss


def _predict(
    pipe: SamplingPipeline, sample: torch.Tensor, timestep: torch.Tensor, conditions: UNetConditions
) -> torch.Tensor:
    return conditions.with_states(conditions.states.to(sample.dtype)).predict(pipe.denoiser, sample, timestep)


def _step(
    pipe: SamplingPipeline,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    away: torch.Tensor,
    towards: torch.Tensor,
    settings: NullText,
) -> torch.Tensor:
    prediction = away + settings.guidance_scale * (towards - away)
    previous: torch.Tensor = pipe.scheduler.step(prediction, timestep, sample, return_dict=False)[0]
    return previous


@contextmanager
def _differentiable(unet: Any, settings: NullText) -> Iterator[None]:
    """Gradients for the embedding alone: none is kept for a weight; everything is put back afterwards."""
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    checkpointing = unet.is_gradient_checkpointing
    for parameter in trainable:
        parameter.requires_grad_(False)
    if settings.gradient_checkpointing and not checkpointing:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        if settings.gradient_checkpointing and not checkpointing:
            unet.disable_gradient_checkpointing()
