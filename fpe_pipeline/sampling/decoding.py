"""Latents as pictures, outside a pipeline's call."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from .flow_models import flow_model, is_flow_model

__all__ = ["decoded"]


@torch.no_grad()
def decoded(pipe: Any, latents: torch.Tensor, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """Latents as a pipeline's callback or a recording has them, as pictures.

    Args:
        pipe: a pipeline of Stable Diffusion or FLUX.1; its autoencoder's dtype decides the arithmetic.
        latents: [images, C, h, w], or of FLUX.1 [images, tokens, 4 · C].
        size: (height, width) of the pictures in pixels, which latents that are packed into tokens do not say.

    Raises:
        ValueError: latents that are packed, without a size.
    """
    if is_flow_model(pipe):
        latents = flow_model(pipe).unpacked(latents, size)
    config = pipe.vae.config
    scaled = latents.to(pipe.vae.dtype) / config.scaling_factor + (config.get("shift_factor") or 0.0)
    pixels = pipe.vae.decode(scaled, return_dict=False)[0]
    pictures: list[Image.Image] = pipe.image_processor.postprocess(pixels, output_type="pil")
    return pictures
