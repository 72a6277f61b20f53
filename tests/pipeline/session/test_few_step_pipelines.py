"""Pipelines of few steps make their picture of the last step's denoised sample, which stands beside the new latents."""

import diffusers
import pytest
import torch

from fpe_pipeline import LocalBlend, editing
from tests.support.tiny_pipelines import PROMPTS, shared_noise, tiny_pipeline
from tests.support.tiny_unets import tiny_unet


def lcm(pipe):
    if not hasattr(diffusers, "LatentConsistencyModelPipeline"):
        pytest.skip("this diffusers has no latent consistency models")
    unet = tiny_unet("sd1", torch.float32, cross_attention_dim=32, time_cond_proj_dim=8)
    parts = {**tiny_pipeline(pipe).components, "unet": unet}
    parts["scheduler"] = diffusers.LCMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False), pipe.tokenizer, {}


def sprint(pipe):
    if not hasattr(diffusers, "SanaSprintPipeline"):
        pytest.skip("this diffusers has no Sana-Sprint")
    from tests.support.tiny_sana import TEXTS, tiny_sana_pipeline

    norm = {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
    made = tiny_sana_pipeline(
        dtype=torch.float32, kind=diffusers.SanaSprintPipeline, scheduler=diffusers.SCMScheduler(), **norm
    )
    options = {"use_resolution_binning": False, "max_sequence_length": TEXTS, "intermediate_timesteps": None}
    return made, made.tokenizer, {**options, "height": 256, "width": 256}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("made", [lcm, sprint])
def test_the_picture_is_blended(pipe, made, steps):
    """Where no place is above the threshold, all of the target's picture is the source's."""
    few, tokenizer, options = made(pipe)
    few.set_progress_bar_config(disable=True)
    prompts = PROMPTS[:2]

    def drawn(threshold):
        blend = LocalBlend(prompts, tokenizer, ["car", "car"], threshold)
        with editing(few, blend):
            return few(
                prompt=prompts,
                latents=shared_noise(2),
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(1),
                output_type="latent",
                **options,
            ).images

    source, target = drawn(1.0)
    assert torch.equal(source, target)
    source, target = drawn(0.0)
    assert (source - target).abs().max() > 1e-4
