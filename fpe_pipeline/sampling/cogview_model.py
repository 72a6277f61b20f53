"""CogView 4 as a flow model: it takes latents [B, C, h, w], is told its image's size, and guides by a second call.

Its σ are shifted by the size of an image and the timesteps that the model is told are not: they are whole numbers,
evenly spaced, and 0 for the image. A prompt is as long as the longest of its call, in multiples of 16 tokens, with the
padding before it, which is attended to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from .flow_model import GuidedByTwoCalls, Latents, Velocity
from .padded_texts import PaddedToLongest

__all__ = ["CogView4"]

#: Tokens of which every text is a multiple.
_FILLED = 16


class _CogView4Velocity(Velocity):
    def _told(self, sigma: torch.Tensor) -> torch.Tensor:
        scheduler = self._pipe.scheduler
        told = torch.cat([scheduler.timesteps, scheduler.timesteps.new_zeros(1)])
        return told[scheduler.sigmas.tolist().index(sigma.item())]

    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        return timestep.expand(latents.shape[0])


class CogView4(PaddedToLongest):
    title = "CogView 4"
    trimmed = frozenset({"text-query", "text-key", "text-value"})

    def own_text_tokens(self, prompt: str, text_length: int, *, conditional: bool = True) -> int:
        tokens = min(len(self.pipe.tokenizer(prompt)["input_ids"]), text_length)
        return -(-tokens // _FILLED) * _FILLED

    @contextmanager
    def beside(self, source: str, targets: Sequence[str], text_length: int) -> Iterator[None]:
        def fill(tokens: torch.Tensor, longest: int) -> torch.Tensor:
            sides = longest - tokens.shape[1], 0
            return torch.nn.functional.pad(tokens, sides, value=self.pipe.tokenizer.pad_token_id)

        with self.padded_beside(source, targets, text_length, fill):
            yield

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size)

    @property
    def native_size(self) -> tuple[int, int]:
        side = int(self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor)
        return side, side

    @property
    def noise_dtype(self) -> torch.dtype:
        return torch.promote_types(self.pipe.transformer.dtype, torch.float32)

    def drawn(self, size: tuple[int, int], generator: Any = None) -> Latents:
        shape = (1, self.latent_channels, *(side // self.pipe.vae_scale_factor for side in size))
        noise: Latents = randn_tensor(shape, generator, self.pipe._execution_device, torch.float32)
        return noise.to(self.noise_dtype)

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        scheduler = self.pipe.scheduler
        most = scheduler.config.num_train_timesteps
        told = np.linspace(most, 1.0, steps).astype(np.int64).astype(np.float32)
        tokens = (size[0] // self.multiple) * (size[1] // self.multiple)
        settings = {"base_image_seq_len": 256, "base_shift": 0.25, "max_shift": 0.75}
        fewest, least, largest = (scheduler.config.get(name, default) for name, default in settings.items())
        shift = (tokens / fewest) ** 0.5 * largest + least
        device = self.pipe._execution_device
        scheduler.set_timesteps(steps, device, timesteps=told, sigmas=told / most, mu=shift)

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        guided = guidance_scale > 1
        texts, away = self.pipe.encode_prompt(
            prompt, None, guided, device=self.pipe._execution_device, max_sequence_length=text_length
        )
        told = {"original_size": size, "target_size": size, "crop_coords": (0, 0)}
        sizes = {name: texts.new_tensor([pair]) for name, pair in told.items()}
        towards = _CogView4Velocity(self.pipe, {**sizes, "encoder_hidden_states": texts}, None)
        if not guided:
            return towards
        conditions = {**sizes, "encoder_hidden_states": away}
        return GuidedByTwoCalls(towards, _CogView4Velocity(self.pipe, conditions, None, "uncond"), guidance_scale)
