"""Krea 2 as a flow model: packed latents, texts that are padded in their middle, and guidance counted from 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .flow_model import Latents, Velocity, check_unguided, shift_of
from .packed_models import CodedAsVideos

__all__ = ["Krea2"]

#: The shift of distilled models, whatever the size of an image.
_DISTILLED = 1.15


class _Krea2Velocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        share: torch.Tensor = timestep / self._pipe.scheduler.config.num_train_timesteps
        return share.expand(latents.shape[0]).to(latents.dtype)


class Krea2(CodedAsVideos):
    @property
    def native_size(self) -> tuple[int, int]:
        return 1024, 1024

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor * self.pipe.patch_size)

    @property
    def key_heads(self) -> int | None:
        return int(self.pipe.transformer.config.num_key_value_heads)

    def channels(self, latent_channels: int) -> int:
        return int(self.pipe.patch_size**2) * latent_channels

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        tokens = (size[0] // self.multiple) * (size[1] // self.multiple)
        self.pipe.scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / steps, steps),
            mu=_DISTILLED if self.pipe.config.is_distilled else shift_of(self.pipe.scheduler, tokens),
            device=self.pipe._execution_device,
        )

    def unpacked(self, latents: Latents, size: tuple[int, int] | None = None) -> Latents:
        if size is None:
            raise ValueError("expected the size of the images, which latents packed into tokens do not say, got None")
        unpacked: Latents = self.pipe._unpack_latents(latents, *size)
        return unpacked

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        check_unguided(guidance_scale, "Krea 2")
        device = self.pipe._execution_device
        texts, mask = self.pipe.encode_prompt(prompt, device, max_sequence_length=text_length)
        grid = (side // self.multiple for side in size)
        conditions: dict[str, Any] = {
            "encoder_hidden_states": texts,
            "encoder_attention_mask": mask,
            "position_ids": self.pipe.prepare_position_ids(texts.shape[1], *grid, device),
        }
        return _Krea2Velocity(self.pipe, conditions, None)
