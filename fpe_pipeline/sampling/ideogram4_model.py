"""Ideogram 4 as a flow model: packed latents, texts that are padded in front, and guidance by a model of its own.

It gives the velocity's opposite, and counts time from noise on. A token holds 2 × 2 latents, place by place, which are
normalised by what its autoencoder saw on average.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from .flow_model import GuidedByTwoCalls, Latents, Velocity
from .packed_models import Flux, moments

__all__ = ["Ideogram4"]


class _Ideogram4Velocity(Velocity):
    """Of one of the two models; the one that guides is given no text.

    Args:
        model: the name of the pipeline's.
        texts: tokens before those of the image, padding too.
    """

    def __init__(self, pipe: Any, conditions: dict[str, Any], model: str, texts: int) -> None:
        super().__init__(pipe, conditions, None)
        self._model, self._texts = getattr(pipe, model), texts

    def _given(self, latents: Latents, timestep: torch.Tensor) -> dict[str, Any]:
        before = latents.new_zeros(len(latents), self._texts, latents.shape[-1])
        given = torch.cat([before, latents], dim=1).to(self._model.dtype)
        share = 1 - timestep / self._pipe.scheduler.config.num_train_timesteps
        return {"hidden_states": given, "timestep": share.expand(len(given)).to(given.dtype), **self.conditions}

    def _predicted(self) -> Latents:
        predicted: Latents = self._model(**self.arguments, return_dict=False)[0]
        return -predicted[:, self._texts :]


class Ideogram4(Flux):
    @property
    def native_size(self) -> tuple[int, int]:
        return self.pipe.parent_default("height"), self.pipe.parent_default("width")

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor * self.pipe.patch_size)

    @property
    def noise_dtype(self) -> torch.dtype:
        return torch.promote_types(self.pipe.transformer.dtype, torch.float32)

    def check_recorded(self, parts: Collection[str], is_guided: bool) -> None:
        raise ValueError(
            "expected a model that sees text in all of its calls, whose layers a recording keeps, got Ideogram 4, "
            "which guides by a model without: edit the prompt or the inversion itself, pipe(…, target_prompt=…)"
        )

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        from diffusers.pipelines.ideogram4 import pipeline_ideogram4  # of no earlier diffusers

        mean, spread = (self.pipe.parent_default(name) for name in ("mu", "std"))
        around = pipeline_ideogram4._resolution_aware_mu(*size, mean)
        sigmas = pipeline_ideogram4._logit_normal_sigmas(steps, around, std=spread)
        self.pipe.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=self.pipe._execution_device)

    def channels(self, latent_channels: int) -> int:
        return int(self.pipe.patch_size**2) * latent_channels

    def encoded(self, pixels: torch.Tensor) -> Latents:
        """As of others, [1, 4 · C, h / 2, w / 2]."""
        mean: Latents = self.pipe.vae.encode(pixels).latent_dist.mean
        patch = self.pipe.patch_size
        parts = mean.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [1, C, h / 2, 2, w / 2, 2]
        grid = parts.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
        middle, spread = moments(self.pipe.vae, grid)
        normalised: Latents = (grid - middle) / spread
        return normalised

    def latents(self, encoded: Latents) -> Latents:
        packed: Latents = encoded.flatten(2).transpose(1, 2)
        return packed

    def unpacked(self, latents: Latents, size: tuple[int, int] | None = None) -> Latents:
        if size is None:
            raise ValueError("expected the size of the images, which latents packed into tokens do not say, got None")
        grid = latents.transpose(1, 2).unflatten(2, tuple(side // self.multiple for side in size))
        mean, spread = moments(self.pipe.vae, grid)
        patch = self.pipe.patch_size
        parts = (grid * spread + mean).unflatten(1, (patch, patch, -1))  # [B, 2, 2, C, h / 2, w / 2]
        unpacked: Latents = parts.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
        return unpacked

    def drawn(self, size: tuple[int, int], generator: Any = None) -> Latents:
        shape = 1, self.tokens(size), self.channels(self.latent_channels)
        noise: Latents = randn_tensor(shape, generator, self.pipe._execution_device, self.noise_dtype)
        return noise

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        grid = tuple(side // self.multiple for side in size)
        texts, *places = self.pipe.encode_prompt(prompt, *grid, text_length, self.pipe._execution_device)
        names = "position_ids", "segment_ids", "indicator"
        conditions = {
            "encoder_hidden_states": texts.to(self.pipe.transformer.dtype),
            **dict(zip(names, places, strict=True)),
        }
        towards = _Ideogram4Velocity(self.pipe, conditions, "transformer", text_length)
        if guidance_scale <= 1:
            return towards
        behind = {name: given[:, text_length:] for name, given in conditions.items()}
        behind["encoder_hidden_states"] = torch.zeros_like(
            behind["encoder_hidden_states"], dtype=self.pipe.unconditional_transformer.dtype
        )
        away = _Ideogram4Velocity(self.pipe, behind, "unconditional_transformer", 0)
        return GuidedByTwoCalls(towards, away, guidance_scale)
