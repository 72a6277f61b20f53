"""`FreePromptXLPipeline`: diffusers' `StableDiffusionXLPipeline` with an edit from a source prompt to many targets."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

from ..sampling.arguments import check_size
from ..sampling.unet_conditions import UNetConditions
from .unet_editing import UNetEditing

__all__ = ["FreePromptXLPipeline"]


class FreePromptXLPipeline(UNetEditing, StableDiffusionXLPipeline):
    """`FreePromptPipeline` for Stable Diffusion XL: two text encoders, and a UNet that is told sizes.

    Made by ``FreePromptPipeline.from_pretrained`` or ``from_pipe`` too. An inversion and a recording tell the UNet that
    the image is whole and of its own size, as a call does by default.

    Example:
        >>> from fpe_pipeline import FreePromptPipeline, ddim_scheduler
        >>> pipe = FreePromptPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
        >>> pipe.scheduler = ddim_scheduler(pipe.scheduler)
        >>> inversion = pipe.invert("beach.jpg", "a photo of a red car on the beach", method="direct")
        >>> out = pipe(inversion=inversion, target_prompt="a photo of a blue car on the beach")
    """

    parent: ClassVar[type] = StableDiffusionXLPipeline
    parts: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "text_encoder_2")
    added_conditions: ClassVar[str | None] = "text_time"
    further_texts: ClassVar[tuple[str, ...]] = ("prompt_2", "negative_prompt_2")

    @classmethod
    def from_pipe(cls, pipeline: Any, **components: Any) -> Any:
        """As in diffusers, but modules keep their dtypes; a model that this class does not serve is refused with the
        way to edit it."""
        if pipeline.config.get("requires_aesthetics_score"):
            raise ValueError(
                "expected a UNet that is told sizes, got a refiner's, which is told an aesthetic score: put "
                "`with editing(pipe, edit):` around its own diffusers pipeline"
            )
        return super().from_pipe(pipeline, **components)

    @torch.no_grad()
    def conditions(self, prompt: str, guided: bool, size: tuple[int, int]) -> UNetConditions:
        """Embeddings of both text encoders [rows, tokens, channels], the pooled ones [rows, P] and sizes [rows, 6]."""
        states, unconditional, pooled, pooled_unconditional = self.encode_prompt(
            prompt, device=self._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=guided
        )
        sizes = self._get_add_time_ids(
            size, (0, 0), size, dtype=states.dtype, text_encoder_projection_dim=pooled.shape[-1]
        ).to(states.device)
        if guided:
            states, pooled = torch.cat([unconditional, states]), torch.cat([pooled_unconditional, pooled])
        return UNetConditions(states, {"text_embeds": pooled, "time_ids": sizes.repeat(len(states), 1)})

    def unconditional_options(self, embeddings: torch.Tensor) -> dict[str, Any]:
        """As of any UNet; beside them stand the pooled ones of the empty prompt."""
        pooled = self.conditions("", True, self.native_size).halves()[0].added["text_embeds"]
        options = super().unconditional_options(embeddings)
        return {**options, "negative_pooled_prompt_embeds": pooled.expand(len(embeddings), -1)}

    def check_inputs(self, prompt: Any, prompt_2: Any, height: int, width: int, *args: Any, **kwargs: Any) -> None:
        """The parent's checks, with the size measured against this autoencoder rather than against 8 pixels."""
        check_size(height, width, self.vae_scale_factor)
        super().check_inputs(prompt, prompt_2, 8, 8, *args, **kwargs)

    @property
    def autoencoder_dtype(self) -> torch.dtype:
        """float32 where the autoencoder's activations overflow in float16, as diffusers decodes."""
        dtype: torch.dtype = self.vae.dtype
        return torch.float32 if dtype is torch.float16 and self.vae.config.force_upcast else dtype
