"""Bria FIBO as a flow model: a token for each latent, guidance in one call of both halves, and layers of an encoder.

Every block reads a text by another of the encoder's layers; texts are masked where they end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from .flow_model import Latents, Velocity
from .packed_models import CodedAsVideos

__all__ = ["BriaFibo"]


class _BriaFiboVelocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        return timestep.expand(latents.shape[0]).to(latents.dtype)


class BriaFibo(CodedAsVideos):
    trimmed = frozenset({"text-key"})

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor)

    def channels(self, latent_channels: int) -> int:
        return latent_channels

    def own_text_tokens(self, prompt: str, text_length: int, *, conditional: bool = True) -> int:
        return min(len(self.pipe.tokenizer(prompt)["input_ids"]), text_length) if prompt else 1

    def check_recorded(self, parts: Collection[str], is_guided: bool) -> None:
        if not {"text-query", "text-value"}.isdisjoint(parts):
            raise ValueError(
                "the edit takes what a source's text tokens ask for, or their values, which go on behind the text in "
                "longer ones, where the encoder reads padding as it stands beside other prompts: record an edit of "
                'image tokens or of words, such as FreePromptEdit(scope="image"), ConsistEdit or PromptToPromptEdit, '
                "or run source and targets together, pipe(source, targets, edit=…)"
            )

    def seen_apart(self, inverted: str, length: int, prompts: Sequence[str], text_length: int) -> str | None:
        if inverted or not any(prompts):
            return None
        return (
            "was inverted with a prompt of one token, which the empty prompt is alone, and beside others it has as "
            "many as the longest: say what the picture shows, or leave every prompt empty"
        )

    @contextmanager
    def beside(self, source: str, targets: Sequence[str], text_length: int) -> Iterator[None]:
        prompts = [source, *targets]
        if any(prompts) and not all(prompts):
            raise ValueError(
                "expected prompts that say something, beside which a source is as it was recorded, got an empty one "
                f"among {prompts}: the pipeline makes an empty prompt as long as the longest of its call. Write "
                "something, or make all together, pipe(source, targets)"
            )
        yield

    def latents(self, encoded: Latents) -> Latents:
        packed: Latents = self.pipe._pack_latents_no_patch(encoded, *encoded.shape)
        return packed

    def unpacked(self, latents: Latents, size: tuple[int, int] | None = None) -> Latents:
        if size is None:
            raise ValueError("expected the size of the images, which latents packed into tokens do not say, got None")
        grid: Latents = self.pipe._unpack_latents_no_patch(latents, *size, self.multiple)
        return grid[:, :, None]  # of a video of one frame

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        device, guided = self.pipe._execution_device, guidance_scale > 1
        texts, away, places, mask, mask_away, layers, layers_away = self.pipe.encode_prompt(
            prompt, device, guidance_scale=guidance_scale, max_sequence_length=text_length
        )
        if guided:
            texts, mask = torch.cat([away, texts]), torch.cat([mask_away, mask])
            layers = [torch.cat(pair) for pair in zip(layers_away, layers, strict=True)]
        grid = tuple(side // self.multiple for side in size)
        conditions = {
            "encoder_hidden_states": texts,
            "text_encoder_layers": self._of_blocks(layers),
            "txt_ids": places[0],
            "img_ids": self.pipe._prepare_latent_image_ids(1, *grid, device, texts.dtype),
            "joint_attention_kwargs": self._masked(mask, grid[0] * grid[1]),
        }
        return _BriaFiboVelocity(self.pipe, conditions, guidance_scale if guided else None)

    def _of_blocks(self, layers: list[torch.Tensor]) -> list[torch.Tensor]:
        """One for each block: the encoder's last ones, or its last again where it has fewer."""
        model = self.pipe.transformer
        blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
        return [*layers, *[layers[-1]] * (blocks - len(layers))][-blocks:]

    @staticmethod
    def _masked(mask: torch.Tensor, images: int) -> dict[str, torch.Tensor]:
        """What tells blocks which text tokens count, where not all do."""
        seen = torch.cat([mask, mask.new_ones(len(mask), images)], dim=1).bool()
        return {} if bool(seen.all()) else {"attention_mask": seen[:, None, None, :]}
