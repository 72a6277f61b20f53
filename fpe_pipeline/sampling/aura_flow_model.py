"""AuraFlow as a flow model: latents [B, C, h, w], guided by a batch of both halves; σ is as the scheduler has it."""

from __future__ import annotations

import math

import torch

from .flow_model import FlowModel, Latents, Velocity

__all__ = ["AuraFlow"]


class _AuraFlowVelocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        # The pipeline makes a float32 number of it, whatever the model's dtype.
        return (timestep / 1000).float().expand(latents.shape[0]).to(latents.dtype)


class AuraFlow(FlowModel):
    def text_tokens(self, text_length: int) -> int:
        return int(self.pipe.transformer.register_tokens.shape[1]) + text_length

    @property
    def native_size(self) -> tuple[int, int]:
        return 1024, 1024

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size)

    @property
    def longest(self) -> int | None:
        return math.isqrt(self.pipe.transformer.config.pos_embed_max_size) * self.multiple

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        self.pipe.scheduler.set_timesteps(steps, device=self.pipe._execution_device)

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        guided = guidance_scale > 1
        texts, _, away, _ = self.pipe.encode_prompt(
            prompt, None, guided, device=self.pipe._execution_device, max_sequence_length=text_length
        )
        texts = torch.cat([away, texts]) if guided else texts
        return _AuraFlowVelocity(self.pipe, {"encoder_hidden_states": texts}, guidance_scale if guided else None)
