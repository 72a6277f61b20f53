"""Nucleus-Image as a flow model: packed latents, texts that are masked where they end, and guidance that keeps lengths.

It gives the velocity's opposite.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..text_parts import plain_tokenizer
from .flow_model import Latents, NormedGuidance, Velocity
from .packed_models import CodedAsVideos, FluxVelocity

__all__ = ["NucleusImage"]


class _NucleusVelocity(FluxVelocity):
    def _predicted(self) -> Latents:
        return -super()._predicted()


class NucleusImage(CodedAsVideos):
    trimmed = frozenset({"text-key"})

    @property
    def text_length(self) -> int:
        """Tokens of a text at most, which the pipeline says and does not keep to by itself."""
        return int(self.pipe.default_max_sequence_length)

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size)

    @property
    def key_heads(self) -> int | None:
        return int(self.pipe.transformer.config.num_key_value_heads)

    def channels(self, latent_channels: int) -> int:
        return int(self.pipe.transformer.config.patch_size**2) * latent_channels

    def own_text_tokens(self, prompt: str, text_length: int, *, conditional: bool = True) -> int:
        tokens = plain_tokenizer(self.pipe.processor)(self.pipe._format_prompt(prompt))["input_ids"]
        return min(len(tokens), text_length)

    def check_recorded(self, parts: Collection[str], is_guided: bool) -> None:
        if not {"text-query", "text-value"}.isdisjoint(parts):
            raise ValueError(
                "the edit takes what a source's text tokens ask for, which is nothing in this model, or their values, "
                "which go on behind the text in longer ones: record an edit of image tokens or of words, such as "
                'FreePromptEdit(scope="image"), ConsistEdit or PromptToPromptEdit'
            )

    def latents(self, encoded: Latents) -> Latents:
        packed: Latents = self.pipe._pack_latents(encoded, *encoded.shape, self.pipe.transformer.config.patch_size)
        return packed

    def unpacked(self, latents: Latents, size: tuple[int, int] | None = None) -> Latents:
        if size is None:
            raise ValueError("expected the size of the images, which latents packed into tokens do not say, got None")
        patch = self.pipe.transformer.config.patch_size
        unpacked: Latents = self.pipe._unpack_latents(latents, *size, patch, self.pipe.vae_scale_factor)
        return unpacked

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        image: dict[str, Any] = {"img_shapes": [(1, *(side // self.multiple for side in size))]}

        def conditions(text: str) -> dict[str, Any]:
            texts, mask = self.pipe.encode_prompt(text, self.pipe._execution_device, max_sequence_length=text_length)
            return {**image, "encoder_hidden_states": texts, "encoder_hidden_states_mask": mask}

        towards = _NucleusVelocity(self.pipe, conditions(prompt), None)
        if guidance_scale <= 1:
            return towards
        return NormedGuidance(towards, _NucleusVelocity(self.pipe, conditions(""), None, "uncond"), guidance_scale)
