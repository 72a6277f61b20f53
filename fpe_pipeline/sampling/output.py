"""What `FreePromptPipeline` returns."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from PIL import Image

from ..atomic_folder import staged
from ..images.side_by_side import Comparison, side_by_side
from ..session.report import EditReport

__all__ = ["FreePromptPipelineOutput"]


@dataclass
class FreePromptPipelineOutput(StableDiffusionPipelineOutput):
    """Images of one call, in prompt order.

    Args:
        images: list of PIL images, or array or tensor with a row an image, as `output_type` asks: the source's
            (where it is kept), then each target's. With `num_images_per_prompt` k, k images a prompt.
        nsfw_content_detected: a bool an image, or None without a safety checker.
        images_per_prompt: the k of the call.
        source_kept: whether `images` begins with the source's.
        report: what was replaced where; ``print(out.report.explain())``. None where nothing was edited.
        prompts: the source's and the targets'; empty where embeddings stood in for them.

    A notebook shows its :meth:`grid`.
    """

    images_per_prompt: int = 1
    source_kept: bool = True
    report: EditReport | None = None
    prompts: tuple[str, ...] = ()

    @property
    def source(self) -> Any:
        """The source's image (with several images per prompt: all of them), or None where it was dropped."""
        return self._of_prompt(0) if self.source_kept else None

    @property
    def targets(self) -> list[Any]:
        """For each target prompt its image (with several images per prompt: all of them)."""
        prompts = len(self.images) // self.images_per_prompt
        return [self._of_prompt(index) for index in range(int(self.source_kept), prompts)]

    def grid(self) -> Image.Image:
        """Source and edits side by side, labelled, a row for each target's image.

        Raises:
            ValueError: latents, which are no pictures.
        """
        images = self._pictures()
        k, first = self.images_per_prompt, int(self.source_kept)
        prompts = self.prompts or ("",) * (len(images) // k + 1 - first)
        sources = images[:k] if self.source_kept else [None] * k
        rows = [
            Comparison(prompts[0], prompt, sources[number], images[(first + index) * k + number])
            for index, prompt in enumerate(prompts[1:])
            for number in range(k)
        ]
        if not rows:  # a source without targets
            rows = [Comparison("", prompts[0], None, image) for image in images]
        return side_by_side(rows, edit_label="edited" if len(prompts) > 1 else "source")

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``source.png``, ``target-1.png`` and so on and ``grid.png`` into a folder, all or nothing.

        Several images a prompt are ``target-1-2.png`` and so on; files of these names are replaced.

        Returns:
            The paths.

        Raises:
            ValueError: latents, which are no pictures.
            InputError: folders that have the files' names.
        """
        named = {"grid.png": self.grid()}
        for index, image in enumerate(self._pictures()):
            prompt, number = divmod(index, self.images_per_prompt)
            prompt += not self.source_kept
            name = f"target-{prompt}" if prompt else "source"
            named[f"{name}-{number + 1}.png" if self.images_per_prompt > 1 else f"{name}.png"] = image
        with staged(Path(folder)) as stage:
            for name, image in named.items():
                image.save(stage / name)
        return [Path(folder) / name for name in named]

    def _repr_html_(self) -> str | None:
        """The grid, for a notebook; None for latents."""
        try:
            grid = self.grid()
        except ValueError:
            return None
        file = io.BytesIO()
        grid.save(file, "PNG")
        return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" alt="source and edits">'

    def __repr__(self) -> str:
        kind = type(self.images[0]).__name__ if isinstance(self.images, list) else f"{type(self.images).__name__} row"
        source = "a source and " if self.source_kept else ""
        each = f", {self.images_per_prompt} images each" if self.images_per_prompt > 1 else ""
        return f"{type(self).__name__}({source}{len(self.targets)} targets{each}, every image a {kind})"

    def _pictures(self) -> list[Image.Image]:
        """The images as PIL images."""
        if isinstance(self.images, list):
            return self.images
        values = self.images
        if values.ndim != 4:
            raise ValueError('expected pictures, these images are latents of tokens: leave out output_type="latent"')
        if isinstance(values, torch.Tensor):
            values = values.detach().float().cpu().permute(0, 2, 3, 1).numpy()  # [B, H, W, C]
        if values.shape[-1] != 3:
            raise ValueError(
                f"expected pictures, these images have {values.shape[-1]} channels as latents have: leave out "
                'output_type="latent"'
            )
        return [Image.fromarray(np.round(image.clip(0, 1) * 255).astype(np.uint8)) for image in values]

    def _of_prompt(self, index: int) -> Any:
        first = index * self.images_per_prompt
        return (
            self.images[first] if self.images_per_prompt == 1 else self.images[first : first + self.images_per_prompt]
        )
