"""A random pipeline that makes an image in tenths of a second: two levels, autoencoder factor 2."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from golden_cases import GOLDEN
from transformers import CLIPTextModel, CLIPTokenizer

from fpe_pipeline import FreePromptPipeline

SOURCE = "a photo of green ducks walking on street"
TARGET = "a photo of rubber ducks walking on street"
OTHER = "a photo of red cars"

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_pipeline() -> FreePromptPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        latent_channels=4,
    )
    folder = GOLDEN / "models" / "tiny-sd15"
    pipe = FreePromptPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder").float(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # Random weights hardly tell prompts apart; at this scale an edit moves the latents well above rounding.
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn" in name and name.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(rows: int = 1, height: int = 12, width: int = 16) -> torch.Tensor:
    """Latents [rows, 4, height, width], the same in every call."""
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(7))
