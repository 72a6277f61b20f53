"""A tiny FreePromptPipeline, whose autoencoder halves images rather than dividing them by 8."""

import torch
from diffusers import AutoencoderKL

from fpe_pipeline import FreePromptPipeline, ddim_scheduler
from tests.support.tiny_pipelines import tiny_pipeline, tiny_sdxl_pipeline

SOURCE = "a photo of green ducks walking on street"
TARGET = "a photo of rubber ducks walking on street"
OTHER = "a photo of red cars"


def free_prompt_pipeline(pipe):
    """One that shares text encoder and tokenizer with ``pipe``; its scheduler is a copy."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    tiny = FreePromptPipeline.from_pipe(tiny_pipeline(pipe, scheduler=scheduler, sample_size=16), vae=_half_size_vae())
    return _that_reads(tiny)


def free_prompt_xl_pipeline(pipe, dtype=torch.float64):
    """One of SDXL's kind that shares the tokenizer with ``pipe``, all of it in one dtype, and runs DDIM."""
    tiny = FreePromptPipeline.from_pipe(
        tiny_sdxl_pipeline(pipe), vae=_half_size_vae(), scheduler=ddim_scheduler(pipe.scheduler)
    )
    tiny.unet.register_to_config(sample_size=16)
    return _that_reads(tiny.to(dtype))


def _that_reads(tiny):
    with torch.no_grad():  # random weights hardly tell prompts apart; at this scale edits move the latents well
        for name, parameter in tiny.unet.named_parameters():
            if "attn" in name and name.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(2.0)
    tiny.set_progress_bar_config(disable=True)
    return tiny


def noise(rows=1, height=12, width=16):
    """Latents [rows, 4, height, width], the same in every call."""
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(7))


def distance(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


def _half_size_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        latent_channels=4,
    )
