"""What `FreePromptPipeline` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput

from .report import EditReport

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
    """

    images_per_prompt: int = 1
    source_kept: bool = True
    report: EditReport | None = None

    @property
    def source(self) -> Any:
        """The source's image (with several images per prompt: all of them), or None where it was dropped."""
        return self._of_prompt(0) if self.source_kept else None

    @property
    def targets(self) -> list[Any]:
        """For each target prompt its image (with several images per prompt: all of them)."""
        prompts = len(self.images) // self.images_per_prompt
        return [self._of_prompt(index) for index in range(int(self.source_kept), prompts)]

    def _of_prompt(self, index: int) -> Any:
        first = index * self.images_per_prompt
        return (
            self.images[first] if self.images_per_prompt == 1 else self.images[first : first + self.images_per_prompt]
        )
