"""Kandinsky 5, of pictures, as a flow model: latents with their channels last, and guidance by a second call.

Its pipeline makes pictures of a list of sizes alone. A text is as long as the longest of its call, with padding behind
it, to which the model attends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor

from .flow_model import GuidedByTwoCalls, Latents, Velocity
from .padded_texts import PaddedToLongest

__all__ = ["Kandinsky5"]


class _Kandinsky5Velocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        return timestep.expand(latents.shape[0]).to(latents.dtype)


class Kandinsky5(PaddedToLongest):
    title = "Kandinsky 5"
    takes_shift: ClassVar[bool] = False
    trimmed = frozenset({"key", "value"})  # of cross-attention, whose text is as long as it is

    @property
    def native_size(self) -> tuple[int, int]:
        return self.pipe.parent_default("height"), self.pipe.parent_default("width")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple((height, width) for width, height in self.pipe.resolutions)

    @property
    def in_channels(self) -> int:
        return int(self.pipe.transformer.config.in_visual_dim)

    @property
    def head_dim(self) -> int:
        return int(sum(self.pipe.transformer.config.axes_dims))

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size[-1])

    def own_text_tokens(self, prompt: str, text_length: int, *, conditional: bool = True) -> int:
        own = self._written_tokens(prompt)
        if own <= text_length:
            return own
        texts, *_ = self.pipe.encode_prompt(prompt, max_sequence_length=text_length)  # which cuts by letters
        return int(texts.shape[1])

    def _written_tokens(self, prompt: str) -> int:
        from diffusers.pipelines.kandinsky5 import pipeline_kandinsky_t2i  # of no earlier diffusers

        written = self.pipe.prompt_template.format(pipeline_kandinsky_t2i.prompt_clean(prompt))
        tokens = self.pipe.tokenizer(text=[written], images=None, videos=None)["input_ids"][0]
        return len(tokens) - int(self.pipe.prompt_template_encode_start_idx)

    def check_texts(self, prompts: Sequence[str], text_length: int) -> None:
        """Raise ValueError for prompts of one call of which one is cut: the pipeline takes padding off the others as if
        it were text."""
        for prompt in prompts:
            tokens = self._written_tokens(prompt)
            if tokens > text_length:
                raise ValueError(
                    f"expected prompts of at most {text_length} tokens in a call of several, got {prompt!r} of "
                    f"{tokens}: {self.pipe.parent.__name__} would cut all of them, the shorter ones too. Write it "
                    "shorter, or pass a larger max_sequence_length"
                )

    @contextmanager
    def beside(self, source: str, targets: Sequence[str], text_length: int) -> Iterator[None]:
        self.check_texts([source, *targets], text_length)

        def fill(tokens: torch.Tensor, longest: int) -> torch.Tensor:
            filling = self.pipe.prompt_template_encode_start_idx + longest - tokens.shape[1]
            tokenizer = self.pipe.plain_tokenizer
            sides = (filling, 0) if tokenizer.padding_side == "left" else (0, filling)
            return torch.nn.functional.pad(tokens, sides, value=tokenizer.pad_token_id)

        with self.padded_beside(source, targets, text_length, fill):
            yield

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        self.pipe.scheduler.set_timesteps(steps, device=self.pipe._execution_device)

    def encoded(self, pixels: torch.Tensor) -> Latents:
        """The pipeline's decoder takes off no shift, whatever the autoencoder's settings say."""
        scaled: Latents = self.pipe.vae.encode(pixels).latent_dist.mean * self.pipe.vae.config.scaling_factor
        return scaled

    def latents(self, encoded: Latents) -> Latents:
        return self.held(encoded)

    def unpacked(self, latents: Latents, size: tuple[int, int] | None = None) -> Latents:
        return latents[:, 0].movedim(-1, 1)

    def drawn(self, size: tuple[int, int], generator: Any = None) -> Latents:
        shape = 1, 1, *self.latent_size(size), self.in_channels
        return self.taken(randn_tensor(shape, generator, self.pipe._execution_device, self.noise_dtype), size)

    def held(self, latents: Latents) -> Latents:
        return latents.movedim(1, -1)[:, None]

    def taken(self, held: Latents, size: tuple[int, int]) -> Latents:
        return self.unpacked(held)

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        device, dtype = self.pipe._execution_device, self.pipe.transformer.dtype
        grid = (1, *(side // self.multiple for side in size))
        image = {
            "visual_rope_pos": [torch.arange(places, device=device) for places in grid],
            "scale_factor": [1.0, 1.0, 1.0],
            "sparse_params": None,
        }

        def of(text: str) -> Velocity:
            texts, pooled, _ = self.pipe.encode_prompt(
                text, max_sequence_length=text_length, device=device, dtype=dtype
            )
            conditions = {"encoder_hidden_states": texts.to(dtype), "pooled_projections": pooled.to(dtype)}
            places = {"text_rope_pos": torch.arange(texts.shape[1], device=device)}
            return _Kandinsky5Velocity(self.pipe, {**image, **conditions, **places}, None)

        if guidance_scale <= 1:
            return of(prompt)
        return GuidedByTwoCalls(of(prompt), of(""), guidance_scale)
