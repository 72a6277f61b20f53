"""Latents as pictures and back, outside a pipeline's call."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image

from .flow_models import flow_model, is_flow_model
from .pipeline import SamplingPipeline

__all__ = ["decoded", "scaled_latents"]


def scaled_latents(vae: Any, encoded: torch.Tensor) -> torch.Tensor:
    """What an autoencoder makes of images [B, C, h, w], as a UNet takes it: of unit variance, as its settings say."""
    mean, std = _moments(vae, encoded)
    scaled: torch.Tensor = (encoded - mean) * vae.config.scaling_factor / std
    return scaled


@torch.no_grad()
def decoded(pipe: Any, latents: torch.Tensor, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """Latents as a pipeline's callback or a recording has them, as pictures.

    Args:
        pipe: a pipeline of Stable Diffusion, SDXL or a flow model; its autoencoder's dtype decides the arithmetic.
        latents: [images, C, h, w], or of FLUX.1 and others [images, tokens, 4 · C].
        size: (height, width) of the pictures in pixels, which latents that are packed into tokens do not say.

    Raises:
        ValueError: latents that are packed, without a size.
    """
    takes_shift = True
    if is_flow_model(pipe):
        flow = flow_model(pipe)
        latents, takes_shift = flow.unpacked(latents, size), flow.takes_shift
    computing = pipe.computing_autoencoder() if isinstance(pipe, SamplingPipeline) else nullcontext(pipe.vae)
    with computing as vae:
        given = latents.to(vae.dtype)
        mean, std = _moments(vae, given)
        scaled = given * std / vae.config.get("scaling_factor", 1.0)
        pixels = vae.decode(scaled + mean if takes_shift else scaled, return_dict=False)[0]
    pixels = pixels[:, :, 0] if pixels.ndim == 5 else pixels  # of a video of one frame
    pictures: list[Image.Image] = pipe.image_processor.postprocess(pixels, output_type="pil")
    return pictures


def _moments(vae: Any, latents: torch.Tensor) -> tuple[Any, Any]:
    """Mean and standard deviation that latents had before they were scaled: by channel, or a shift and 1."""
    config = vae.config
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, 1.0
    by_channel = 1, -1, *[1] * (latents.ndim - 2)
    return latents.new_tensor(mean).view(by_channel), latents.new_tensor(std).view(by_channel)
