"""Flow models with the blocks of FLUX.1 and other runs around them: Ovis-Image, LongCat-Image and Bria.

Ovis-Image and LongCat-Image guide by a second call. Bria guides in one call of both halves, where zeros stand for a
negative prompt that there is not, and is told the scheduler's own timestep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from .flow_model import GuidedByTwoCalls, Latents, Velocity
from .packed_models import Flux, FluxVelocity

__all__ = ["Bria", "LongCat", "Ovis", "reading"]


class Ovis(Flux):
    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        guided, device = guidance_scale > 1, self.pipe._execution_device
        texts, away, places, away_places = self.pipe.encode_prompt(
            prompt, "", guided, device, max_sequence_length=text_length
        )
        grid = (side // self.multiple for side in size)
        image = {"img_ids": self.pipe._prepare_latent_image_ids(1, *grid, device, texts.dtype)}
        towards = FluxVelocity(self.pipe, {**image, "encoder_hidden_states": texts, "txt_ids": places}, None)
        if not guided:
            return towards
        conditions = {**image, "encoder_hidden_states": away, "txt_ids": away_places}
        return GuidedByTwoCalls(towards, FluxVelocity(self.pipe, conditions, None, "uncond"), guidance_scale)


class _ShortenedGuidance(GuidedByTwoCalls):
    """Guidance of which no token is longer than what is guided, as the pipeline does by default."""

    def _guided(self, away: Latents, towards: Latents) -> Latents:
        guided = super()._guided(away, towards)
        if not self._pipe.parent_default("enable_cfg_renorm"):
            return guided
        least = self._pipe.parent_default("cfg_renorm_min")
        share = towards.norm(dim=-1, keepdim=True) / (guided.norm(dim=-1, keepdim=True) + 1e-8)
        return guided * share.clamp(min=least, max=1.0)


class LongCat(Flux):
    @property
    def text_length(self) -> int:
        """Tokens of a text, which the pipeline is told by an attribute."""
        return int(self.pipe.tokenizer_max_length)

    def drawn(self, size: tuple[int, int], generator: Any = None) -> Latents:
        shape = (1, self.latent_channels, *self.latent_size(size))
        noise = randn_tensor(shape, generator, self.pipe._execution_device)  # of torch's default dtype, and then cast
        return self.latents(noise.to(self.noise_dtype))

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids  # of no earlier diffusers

        height, width = (side // self.multiple for side in size)
        start = (text_length, text_length)  # an image stands behind as many tokens as a text may have
        places = prepare_pos_ids(modality_id=1, type="image", start=start, height=height, width=width)
        image = {"img_ids": places.to(self.pipe._execution_device)}

        def conditions(text: str) -> dict[str, Any]:
            texts, text_places = self.pipe.encode_prompt(text)
            return {**image, "encoder_hidden_states": texts, "txt_ids": text_places}

        with reading(self.pipe, text_length):
            towards = FluxVelocity(self.pipe, conditions(prompt), None)
            if guidance_scale <= 1:
                return towards
            away = FluxVelocity(self.pipe, conditions(""), None, "uncond")
        return _ShortenedGuidance(towards, away, guidance_scale)


@contextmanager
def reading(pipe: Any, text_length: int | None) -> Iterator[None]:
    """Let a pipeline of LongCat-Image read texts of so many tokens in a block; None for as many as it is told."""
    told = pipe.tokenizer_max_length
    pipe.tokenizer_max_length = text_length or told
    try:
        yield
    finally:
        pipe.tokenizer_max_length = told


class _BriaVelocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        return timestep.expand(latents.shape[0])


class Bria(Flux):
    """Its pipeline counts the two latents across a token in its scale factor."""

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor)

    @property
    def latent_pixels(self) -> int:
        return self.multiple // 2

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.latent_pixels, size[1] // self.latent_pixels

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        from diffusers.pipelines.bria.pipeline_bria import get_original_sigmas  # of no earlier diffusers

        scheduler = self.pipe.scheduler
        if scheduler.config.use_dynamic_shifting:
            super().set_timesteps(steps, size)
            return
        sigmas = get_original_sigmas(scheduler.config.num_train_timesteps, steps)
        scheduler.set_timesteps(sigmas=sigmas, device=self.pipe._execution_device)

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        guided, device = guidance_scale > 1, self.pipe._execution_device
        texts, away, places = self.pipe.encode_prompt(
            prompt, device, do_classifier_free_guidance=guided, max_sequence_length=text_length
        )
        grid = (side // self.multiple for side in size)
        conditions = {
            "encoder_hidden_states": torch.cat([away, texts]) if guided else texts,
            "txt_ids": places[0],
            "img_ids": self.pipe._prepare_latent_image_ids(1, *grid, device, texts.dtype)[0],
        }
        return _BriaVelocity(self.pipe, conditions, guidance_scale if guided else None)
