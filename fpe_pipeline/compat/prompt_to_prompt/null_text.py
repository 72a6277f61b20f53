"""The null-text notebook's ``NullInversion``, over this package's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ...images.load import load_image
from ...inversion.null_text import NullText
from ...inversion.trajectory import Inversion
from ...pipelines.free_prompt import FreePromptPipeline
from ..given import numbers, shown
from .ptp_utils import latent2image, register_attention_control

__all__ = ["NullInversion"]


class NullInversion:
    """Null-text inversion: an unconditional embedding for each step, with which a real image comes out again.

    Args:
        model: a Stable Diffusion pipeline with a DDIM scheduler.
        num_ddim_steps: of the runs.
        guidance_scale: of the edits to come.
    """

    def __init__(self, model: Any, num_ddim_steps: int = 50, guidance_scale: float = 7.5) -> None:
        self.model, self.num_ddim_steps, self.guidance_scale = model, num_ddim_steps, guidance_scale
        self.prompt: str | None = None
        self.inversion: Inversion | None = None

    @property
    def scheduler(self) -> Any:
        """The pipeline's."""
        return self.model.scheduler

    def invert(
        self,
        image_path: Any,
        prompt: str,
        offsets: tuple[int, int, int, int] = (0, 0, 0, 0),
        num_inner_steps: int = 10,
        early_stop_epsilon: float = 1e-5,
        verbose: bool = False,
    ) -> tuple[tuple[np.ndarray, np.ndarray], torch.Tensor, list[torch.Tensor]]:
        """The noise of a picture and the embeddings that lead back to it; a registered controller is taken off.

        Args:
            image_path: a path, a PIL image or an array [H, W, 3].
            prompt: the picture's.
            offsets: pixels that are cut off at the left, right, top and bottom.
            num_inner_steps: most iterations a step.
            early_stop_epsilon: the error below which the first step ends.
            verbose: show the steps.

        Returns:
            (the picture as it was encoded, as the autoencoder gives it back), both [H, W, 3], uint8; the noise
            [1, C, h, w]; and for each step an unconditional embedding [1, M, C].

        Raises:
            ValueError: offsets that are no four pixel counts from 0 on, or that leave nothing of the picture.
        """
        picture = _cut(image_path, offsets)
        register_attention_control(self.model, None)
        pipe = FreePromptPipeline.from_pipe(self.model)
        pipe.set_progress_bar_config(disable=not verbose)
        height, width = pipe.native_size
        picture = load_image(picture, (width, height), multiple=pipe.vae_scale_factor)
        settings = NullText(self.guidance_scale, num_inner_steps, early_stop_epsilon)
        self.prompt = prompt
        self.inversion = pipe.invert(
            picture, prompt, num_inference_steps=self.num_ddim_steps, method=settings, height=height, width=width
        )
        assert self.inversion.unconditional is not None
        latents = self.inversion.latents
        back = latent2image(pipe.vae, latents[0])[0]
        return (np.asarray(self.inversion.image), back), latents[-1], list(self.inversion.unconditional)


def _cut(image: Any, offsets: tuple[int, int, int, int]) -> Any:
    cut = numbers("offsets", offsets)
    if len(cut) != 4 or min(cut) < 0:
        raise ValueError(
            "offsets: expected the pixels that are cut off at the left, right, top and bottom, from 0 on, got "
            f"{offsets!r}"
        )
    if not any(cut):
        return image
    left, right, top, bottom = cut
    opened = Image.open(image) if isinstance(image, str | Path) else image
    opened = ImageOps.exif_transpose(opened) if isinstance(opened, Image.Image) else Image.fromarray(shown(opened))
    if left + right >= opened.width or top + bottom >= opened.height:
        raise ValueError(
            f"offsets={tuple(cut)} cut off all of a picture of {opened.width} x {opened.height} pixels (width x height)"
        )
    return opened.crop((left, top, opened.width - right, opened.height - bottom))
