"""Tiny pipelines of flow models, as diffusers has them and as FreePromptPipeline serves them."""

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from fpe_pipeline import FreePromptFluxPipeline, FreePromptPipeline, FreePromptSD3Pipeline, flow_scheduler
from tests.support.tiny_transformers import PROMPTS, ExactEuler, tiny_flux_pipeline, tiny_sd3_pipeline

SOURCE, TARGET, OTHER = PROMPTS[:3]
FAMILIES = ["sd3", "flux"]
PARENTS = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}
CLASSES = {"sd3": FreePromptSD3Pipeline, "flux": FreePromptFluxPipeline}
MADE = {"sd3": tiny_sd3_pipeline, "flux": tiny_flux_pipeline}
EXACT = {"sd3": 1e-8, "flux": 1e-6}  # diffusers turns queries and keys of FLUX in float32
SIZE = {"height": 48, "width": 80}
STEPS = 4
FAST = {"num_inference_steps": STEPS, "max_sequence_length": 12, "output_type": "latent"}


def edited_with(stock):
    """Ours, around the parts of diffusers' pipeline."""
    tiny = FreePromptPipeline.from_pipe(stock)
    tiny.set_progress_bar_config(disable=True)
    return tiny


def noise(family, rows=1, seed=0):
    """Latents of an image of SIZE as the model takes them."""
    latents = torch.randn(rows, 16, 6, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return latents if family == "sd3" else FluxPipeline._pack_latents(latents, rows, 16, 6, 10)


def repeated(latents, count):
    """The same rows for each of so many prompts."""
    return latents.repeat(count, *[1] * (latents.ndim - 1))


def distance(actual, expected):
    return (actual - expected).abs().max().item()


def solving(tiny, solver):
    """The pipeline with a scheduler of this solver, whose steps are made in float64."""
    euler = ExactEuler(shift=3.0)
    tiny.scheduler = euler if solver == "euler" else flow_scheduler(euler, solver)
    return tiny


class StandIn:
    """Calls ours as diffusers' own pipeline."""

    def __init__(self, tiny):
        self.tiny, self.transformer, self.scheduler = tiny, tiny.transformer, tiny.scheduler

    def __call__(self, *args, **kwargs):
        return self.tiny.parent.__call__(self.tiny, *args, **kwargs)
