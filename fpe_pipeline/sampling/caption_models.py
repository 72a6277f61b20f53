"""Flow models whose images are turned by the length of their captions: Lumina 2 and Z-Image.

Both give the velocity's opposite, and count time from noise on. Lumina 2 takes latents [B, C, h, w] and captions with
their masks, and guides by a second call; Z-Image takes lists of latents and of captions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..models.adapters import lumina2
from ..models.adapters.z_image import filled_up
from ..text_parts import conversation
from .flow_model import FlowModel, Latents, NormedGuidance, Velocity, check_unguided, shift_of

__all__ = ["Lumina2", "ZImage"]

#: Of text tokens, all of which end with their own: no edit reaches beyond.
_TEXTS = frozenset({"text-query", "text-key", "text-value"})


class _Lumina2Velocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        return 1 - timestep.expand(latents.shape[0]) / 1000

    def _predicted(self) -> Latents:
        return -super()._predicted()


class Lumina2(FlowModel):
    trimmed = _TEXTS

    def own_text_tokens(self, prompt: str, text_length: int, *, conditional: bool = True) -> int:
        written = lumina2.template(self.pipe, {}).before + prompt if conditional else prompt
        return min(len(self.pipe.tokenizer(written)["input_ids"]), text_length)

    @property
    def head_dim(self) -> int:
        config = self.pipe.transformer.config
        return int(config.hidden_size // config.num_attention_heads)

    @property
    def key_heads(self) -> int | None:
        heads: int | None = self.pipe.transformer.config.num_kv_heads
        return heads

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size)

    def cast(self, latents: Latents) -> Latents:
        return latents.to(self.noise_dtype)  # the pipeline hands them to the model as they come

    @property
    def longest(self) -> int | None:
        return int(min(self.pipe.transformer.config.axes_lens[1:]) * self.multiple)

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        channels = self.pipe.transformer.config.in_channels  # by which the pipeline shifts, not by tokens
        self.pipe.scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / steps, steps),
            mu=shift_of(self.pipe.scheduler, channels),
            device=self.pipe._execution_device,
        )

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        guided = guidance_scale > 1
        texts, mask, away, away_mask = self.pipe.encode_prompt(
            prompt, guided, device=self.pipe._execution_device, max_sequence_length=text_length
        )
        conditions = {"encoder_hidden_states": texts, "encoder_attention_mask": mask}
        towards = _Lumina2Velocity(self.pipe, conditions, None)
        if not guided:
            return towards
        conditions = {"encoder_hidden_states": away, "encoder_attention_mask": away_mask}
        return NormedGuidance(towards, _Lumina2Velocity(self.pipe, conditions, None), guidance_scale)


class _ZImageVelocity(Velocity):
    def _given(self, latents: Latents, timestep: torch.Tensor) -> dict[str, Any]:
        given = latents.to(self._pipe.transformer.dtype)[:, :, None]  # of one frame
        turned = (1000 - timestep.expand(latents.shape[0])) / 1000
        return {"x": list(given.unbind()), "t": turned, **self.conditions}

    def _predicted(self) -> Latents:
        rows = self._pipe.transformer(**self.arguments, return_dict=False)[0]
        return -torch.stack([row[:, 0] for row in rows])


class ZImage(FlowModel):
    trimmed = _TEXTS

    def own_text_tokens(self, prompt: str, text_length: int, *, conditional: bool = True) -> int:
        said = conversation(self.pipe.tokenizer, enable_thinking=True)
        tokens = self.pipe.tokenizer(said.before + prompt + said.after)["input_ids"]
        return filled_up(min(len(tokens), text_length))

    def filling_tokens(self, size: tuple[int, int]) -> int:
        tokens = (size[0] // self.multiple) * (size[1] // self.multiple)
        return filled_up(tokens) - tokens

    @property
    def native_size(self) -> tuple[int, int]:
        return 1024, 1024

    @property
    def head_dim(self) -> int:
        config = self.pipe.transformer.config
        return int(config.dim // config.n_heads)

    @property
    def noise_dtype(self) -> torch.dtype:
        return torch.promote_types(self.pipe.transformer.dtype, torch.float32)

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.transformer.config.all_patch_size[0]

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        self.pipe.scheduler.set_timesteps(
            sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(),
            mu=shift_of(self.pipe.scheduler, (size[0] // self.multiple) * (size[1] // self.multiple)),
            device=self.pipe._execution_device,
        )

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        check_unguided(guidance_scale, "Z-Image")
        captions, _ = self.pipe.encode_prompt(
            [prompt], self.pipe._execution_device, False, max_sequence_length=text_length
        )
        return _ZImageVelocity(self.pipe, {"cap_feats": captions}, None)
