"""The noise schedule under a run: its identity, deterministic DDIM on it, and DDIM's step backwards."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

__all__ = ["NoiseSchedule", "ddim_inverse_step", "ddim_scheduler", "require_ddim"]

# Of products of up to a thousand float32 numbers near one.
RELATIVE_ROUNDING, ABSOLUTE_ROUNDING = 1e-5, 1e-6


@dataclass(frozen=True)
class NoiseSchedule:
    """What latents of one run have to share with another run to mean the same there.

    Args:
        scheduler: class name of the diffusers scheduler.
        timesteps: of the run, noisiest first.
        levels: ᾱ, the share of the signal in the variance, at each of them, and at the end where that is set apart;
            () where a record does not say them, which then follow from the settings. Of flow matching σ, the share of
            the noise, at each and at the end.
        settings: every option of that class, such as what the UNet predicts and the order of the solver.
    """

    scheduler: str
    timesteps: tuple[float, ...]
    levels: tuple[float, ...]
    settings: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule that a diffusers scheduler is set to; ``set_timesteps`` has run.

        Raises:
            ValueError: a scheduler of neither, which has no noise level a timestep.
        """
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            timesteps, sigmas = (tuple(map(float, numbers)) for numbers in (scheduler.timesteps, scheduler.sigmas))
            return cls(type(scheduler).__name__, timesteps, sigmas, _settings(scheduler))
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(scheduler).__name__} has no noise level for each timestep of training (alphas_cumprod), by "
                "which a run is recognised: use a scheduler made for Stable Diffusion, such as DDIM or DPM-Solver++, "
                "or for a transformer FlowMatchEulerDiscreteScheduler"
            )
        timesteps = tuple(float(t) for t in scheduler.timesteps)
        known = scheduler.alphas_cumprod
        last = getattr(scheduler, "final_alpha_cumprod", None)
        ends = () if last is None else (float(last),)
        return cls(
            scheduler=type(scheduler).__name__,
            timesteps=timesteps,
            levels=(*(float(known[min(max(round(t), 0), len(known) - 1)]) for t in timesteps), *ends),
            settings=_settings(scheduler),
        )

    @property
    def is_flow(self) -> bool:
        """Whether it is one of flow matching."""
        return "use_dynamic_shifting" in self.settings

    @property
    def steps(self) -> int:
        """Calls of the model in the run."""
        return len(self.timesteps)

    def check(self, scheduler: Any, what: str) -> None:
        """Raise ValueError unless ``scheduler`` is set to this schedule; ``what`` names whose schedule this is.

        Numbers are compared to rounding: schedulers compute them in float32, and CPUs round differently.
        """
        here = NoiseSchedule.of(scheduler)
        names = ("scheduler", "timesteps", *(["levels"] if self.levels else []))
        pairs = {name: (getattr(self, name), getattr(here, name)) for name in names}
        if self.scheduler == here.scheduler:
            options = sorted(self.settings.keys() | here.settings.keys())
            pairs |= {name: (self.settings.get(name), here.settings.get(name)) for name in options}
        differences = [
            f"{name} {_short(known)} there and {_short(found)} here"
            for name, (known, found) in pairs.items()
            if not _agree(known, found)
        ]
        if differences:
            raise ValueError(
                f"the {what} belongs to another noise schedule: {'; '.join(differences)}; use the scheduler and the "
                f"number of steps that it was made with, or make it again"
            )


def ddim_scheduler(scheduler: Any) -> DDIMScheduler | CogVideoXDDIMScheduler:
    """A DDIM scheduler that runs backwards as well, on the noise levels that another scheduler is configured with.

    Samples are not clipped, and the last step ends at the first training timestep, as Stable Diffusion's own
    samplers do. Example: ``pipe.scheduler = ddim_scheduler(pipe.scheduler)``.

    Args:
        scheduler: a diffusers scheduler, whose configuration is read.

    Returns:
        A new scheduler; the one that was passed stays as it is. Of those of CogView 3 Plus and CogVideoX, which shift
        noise levels, the DDIM of their kind, which does not clip and ends where they do.
    """
    if "snr_shift_scale" in scheduler.config:
        return CogVideoXDDIMScheduler.from_config(scheduler.config)
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False, set_alpha_to_one=False)


def require_ddim(scheduler: Any, what: str) -> None:
    """Raise ValueError unless each step of ``scheduler`` can be undone by :func:`ddim_inverse_step`."""
    hint = "set pipe.scheduler = fpe_pipeline.ddim_scheduler(pipe.scheduler) before inverting and editing"
    if isinstance(scheduler, CogVideoXDDIMScheduler):  # which clips nothing, whatever its settings say
        return
    if not isinstance(scheduler, DDIMScheduler):
        raise ValueError(f"{what} needs DDIM, whose steps can be undone, got {type(scheduler).__name__}; {hint}")
    if scheduler.config.clip_sample or scheduler.config.thresholding:
        raise ValueError(f"{what} needs DDIM without clip_sample and thresholding, which cannot be undone; {hint}")


def ddim_inverse_step(
    scheduler: DDIMScheduler | CogVideoXDDIMScheduler, model_output: torch.Tensor, timestep: int, sample: torch.Tensor
) -> torch.Tensor:
    """The sample at ``timestep`` from the less noisy one: what ``scheduler.step`` (eta 0) would lead back from.

    DDIM written for one noise estimate, z_a = √ᾱ_a x₀ + √(1 - ᾱ_a) ε, with x₀ and ε taken at the less noisy end.

    Args:
        model_output: the UNet's prediction for ``sample`` at ``timestep`` [B, C, h, w].
        timestep: one of ``scheduler.timesteps``.
        sample: latents one step less noisy than ``timestep`` [B, C, h, w].

    Source: Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, section 4.3.
    """
    levels = scheduler.alphas_cumprod
    before = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    less_noisy = levels[before] if before >= 0 else scheduler.final_alpha_cumprod
    signal, noise = less_noisy**0.5, (1 - less_noisy) ** 0.5
    if scheduler.config.prediction_type == "epsilon":
        epsilon = model_output
        clean = (sample - noise * epsilon) / signal
    elif scheduler.config.prediction_type == "v_prediction":
        clean = signal * sample - noise * model_output
        epsilon = signal * model_output + noise * sample
    else:
        raise ValueError(
            f"expected a model that predicts epsilon or v_prediction, got {scheduler.config.prediction_type!r}"
        )
    noisier: torch.Tensor = levels[timestep] ** 0.5 * clean + (1 - levels[timestep]) ** 0.5 * epsilon
    return noisier


def _settings(scheduler: Any) -> dict[str, Any]:
    """A scheduler's options, as JSON would give them back.

    Its configuration also carries options of the classes that it was converted from, which do nothing.
    """
    options = inspect.signature(type(scheduler).__init__).parameters
    settings = {name: value for name, value in scheduler.config.items() if name in options}
    readable: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return readable


def _agree(known: Any, found: Any) -> bool:
    """Whether two values are equal; numbers of a run, to rounding."""
    if isinstance(known, tuple) and isinstance(found, tuple):
        return len(known) == len(found) and all(
            math.isclose(one, other, rel_tol=RELATIVE_ROUNDING, abs_tol=ABSOLUTE_ROUNDING)
            for one, other in zip(known, found, strict=True)
        )
    return bool(known == found)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"of {len(value)} steps from {value[0]:g} to {value[-1]:g}"
    return str(value)[:32]
