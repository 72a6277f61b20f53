"""Flow models that take latents packed into tokens [B, N, 4 · C]: FLUX.1 and FLUX.2 [dev], which are told their
guidance, and those that guide by a second call, FLUX.2 [klein], Qwen-Image and Chroma.

The latents of FLUX.2 are normalised by what its autoencoder saw on average (the statistics of a batch norm), once 2 × 2
of them are laid behind one another as channels; so its pipelines' calls take them, [B, 4 · C, h / 2, w / 2].
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from ..models.adapters.families import adapter_of
from ..models.adapters.flux2 import is_klein
from ..text_parts import plain_tokenizer
from .flow_model import FlowModel, GuidedByTwoCalls, Latents, Velocity, shift_of

__all__ = ["Chroma", "CodedAsVideos", "Flux", "Flux2", "FluxVelocity", "Qwen", "Qwen21", "moments"]


class FluxVelocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        return timestep.expand(latents.shape[0]).to(latents.dtype) / 1000


class Flux(FlowModel):
    is_packed = True

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * 2

    def sigmas(self, steps: int) -> Any:
        """σ of so many steps' beginnings, before the scheduler shifts them."""
        return np.linspace(1.0, 1 / steps, steps)

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        self.pipe.scheduler.set_timesteps(
            sigmas=self.sigmas(steps),
            mu=shift_of(self.pipe.scheduler, self.tokens(size)),
            device=self.pipe._execution_device,
        )

    def latents(self, encoded: Latents) -> Latents:
        return self.pipe._pack_latents(encoded, *encoded.shape)

    def unpacked(self, latents: Latents, size: tuple[int, int] | None = None) -> Latents:
        if size is None:
            raise ValueError("expected the size of the images, which latents packed into tokens do not say, got None")
        return self.pipe._unpack_latents(latents, *size, self.pipe.vae_scale_factor)

    def channels(self, latent_channels: int) -> int:
        return 4 * latent_channels

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        device = self.pipe._execution_device
        texts, pooled, text_places = self.pipe.encode_prompt(
            prompt=prompt, prompt_2=None, device=device, max_sequence_length=text_length
        )
        grid = (side // self.multiple for side in size)
        guidance = None
        if self.pipe.transformer.config.guidance_embeds:
            guidance = torch.full([1], guidance_scale, device=device, dtype=torch.float32)
        conditions = {
            "encoder_hidden_states": texts,
            "pooled_projections": pooled,
            "txt_ids": text_places,
            "img_ids": self.pipe._prepare_latent_image_ids(1, *grid, device, texts.dtype),
            "guidance": guidance,
        }
        return FluxVelocity(self.pipe, conditions, None)


class Flux2(Flux):
    is_packed = False

    @property
    def latent_pixels(self) -> int:
        return self.multiple

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu  # of no earlier diffusers

        scheduler, tokens = self.pipe.scheduler, (size[0] // self.multiple) * (size[1] // self.multiple)
        given: dict[str, Any] = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        if scheduler.config.get("use_flow_sigmas"):
            given = {"num_inference_steps": steps}
        scheduler.set_timesteps(**given, mu=compute_empirical_mu(tokens, steps), device=self.pipe._execution_device)

    def encoded(self, pixels: torch.Tensor) -> Latents:
        """As of others, [1, 4 · C, h / 2, w / 2]."""
        grid = self.pipe._patchify_latents(self.pipe.vae.encode(pixels).latent_dist.mean)
        mean, spread = moments(self.pipe.vae, grid)
        return (grid - mean) / spread

    def latents(self, encoded: Latents) -> Latents:
        return self.held(encoded)

    def unpacked(self, latents: Latents, size: tuple[int, int] | None = None) -> Latents:
        if size is None:
            raise ValueError("expected the size of the images, which latents packed into tokens do not say, got None")
        grid = self.taken(latents, size)
        mean, spread = moments(self.pipe.vae, grid)
        return self.pipe._unpatchify_latents(grid * spread + mean)

    def drawn(self, size: tuple[int, int], generator: Any = None) -> Latents:
        shape = (1, self.channels(self.latent_channels), *(side // self.multiple for side in size))
        return randn_tensor(shape, generator, self.pipe._execution_device, self.noise_dtype)

    def held(self, latents: Latents) -> Latents:
        return latents.flatten(2).transpose(1, 2)

    def taken(self, held: Latents, size: tuple[int, int]) -> Latents:
        return held.transpose(1, 2).unflatten(2, tuple(side // self.multiple for side in size))

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        pipe, device = self.pipe, self.pipe._execution_device
        grid = torch.empty(1, 1, *(side // self.multiple for side in size))
        image: dict[str, Any] = {"img_ids": pipe._prepare_latent_ids(grid).to(device), "guidance": None}

        def conditions(text: str) -> dict[str, Any]:
            texts, places = pipe.encode_prompt(text, device, max_sequence_length=text_length)
            return {**image, "encoder_hidden_states": texts, "txt_ids": places}

        if not is_klein(pipe):
            image["guidance"] = torch.full([1], guidance_scale, device=device, dtype=torch.float32)
        elif guidance_scale > 1 and pipe.config.is_distilled:
            raise ValueError(
                f"this FLUX.2 [klein] was distilled to be without guidance, got guidance_scale={guidance_scale:g}: "
                "leave it at 1"
            )
        elif guidance_scale > 1:
            away = FluxVelocity(pipe, conditions(""), None, "uncond")
            return GuidedByTwoCalls(FluxVelocity(pipe, conditions(prompt), None), away, guidance_scale)
        return FluxVelocity(pipe, conditions(prompt), None)


def moments(vae: Any, grid: Latents) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel of a grid [B, 4 · C, h / 2, w / 2], as FLUX.2's autoencoder knows
    them."""
    mean, variance = (given.view(1, -1, 1, 1) for given in (vae.bn.running_mean, vae.bn.running_var))
    return mean.to(grid), torch.sqrt(variance + vae.config.batch_norm_eps).to(grid)


class CodedAsVideos(Flux):
    """Latents of an autoencoder of videos, to which a picture is one of one frame."""

    @property
    def latent_channels(self) -> int:
        return int(self.pipe.vae.config.z_dim)

    def encoded(self, pixels: torch.Tensor) -> Latents:
        config = self.pipe.vae.config
        mean = self.pipe.vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]
        shift, spread = (mean.new_tensor(each) for each in (config.latents_mean, config.latents_std))
        return (mean - shift[:, None, None]) / spread[:, None, None]


class Qwen(CodedAsVideos):
    trimmed = frozenset({"text-key"})  # what asks, and values, an edit may take of padding too
    takes_guidance = False

    def own_text_tokens(self, prompt: str, text_length: int, *, conditional: bool = True) -> int:
        tokens = self.pipe.tokenizer(self.pipe.prompt_template_encode.format(prompt))["input_ids"]
        return min(len(tokens) - self.pipe.prompt_template_encode_start_idx, text_length)

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        _refuse_guidance(guidance_scale)
        texts, mask = self.pipe.encode_prompt(
            prompt=prompt, device=self.pipe._execution_device, max_sequence_length=text_length
        )
        conditions = {
            "encoder_hidden_states": texts,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, *(side // self.multiple for side in size))]],
            "guidance": None,
        }
        return FluxVelocity(self.pipe, conditions, None)


def _refuse_guidance(scale: float) -> None:
    if scale > 1:
        raise ValueError(
            "Qwen-Image guides by a negative prompt, which an inversion has none of, got "
            f"guidance_scale={scale:g}: leave it at 1, and guide the edits with true_cfg_scale"
        )


class _Qwen21Velocity(FluxVelocity):
    def _predicted(self) -> Latents:
        return super()._predicted()[:, -self.arguments["hidden_states"].shape[1] :]  # behind those of the text


class Qwen21(Qwen):
    """A token is one latent of its autoencoder's, which has transparency; four of them are one of its encoder's."""

    text_length = 0

    @property
    def native_size(self) -> tuple[int, int]:
        side = self.pipe.parent_default("output_resolution")
        return side, side

    @property
    def multiple(self) -> int:
        return 2 * int(self.pipe.vae_scale_factor)

    def tokens(self, size: tuple[int, int]) -> int:
        return math.prod(self.latent_size(size))

    def channels(self, latent_channels: int) -> int:
        return latent_channels

    def own_text_tokens(self, prompt: str, text_length: int, *, conditional: bool = True) -> int:
        tokenizer = plain_tokenizer(self.pipe.processor)
        return len(tokenizer(self.pipe.prompt_template_t2i.format(prompt or " "))["input_ids"]) - self.pipe._drop_idx

    def seen_apart(self, inverted: str, length: int, prompts: Sequence[str], text_length: int) -> str | None:
        alone = length or self.own_text_tokens(inverted, 0)
        beside = text_length or max(self.own_text_tokens(prompt, 0) for prompt in prompts)
        if beside == alone:
            return None
        return (
            f"was inverted behind {alone} text tokens and is denoised behind {beside}, so that it stands elsewhere: "
            f"invert with max_sequence_length={max(alone, beside)}, which the call then takes over"
        )

    def check_texts(self, prompts: Sequence[str], text_length: int) -> None:
        for prompt in prompts if text_length else ():
            tokens = self.own_text_tokens(prompt, text_length)
            if tokens > text_length:
                raise ValueError(
                    f"expected prompts of at most {text_length} tokens, behind which images stand in this run, as a "
                    f"recording or max_sequence_length says, got {prompt!r} of {tokens}: record or invert with "
                    f"max_sequence_length={tokens} or more, or leave it out of the call"
                )

    def check_recorded(self, parts: Collection[str], is_guided: bool) -> None:
        if "text-query" in parts:
            raise ValueError(
                "the edit changes what text tokens become, and in this model they look at no image and are computed "
                'once for all steps: use an edit of image tokens or of words, such as FreePromptEdit(scope="image"), '
                "ConsistEdit or PromptToPromptEdit"
            )

    def encoded(self, pixels: torch.Tensor) -> Latents:
        return super().encoded(torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1))  # opaque

    def sigmas(self, steps: int) -> Any:
        told = self.pipe.config.sample_sigmas
        if told is not None and len(told) != steps:
            raise ValueError(
                f"this model has sigmas of its own (sample_sigmas), which make {len(told)} steps, got {steps}: pass "
                f"num_inference_steps={len(told)}"
            )
        return super().sigmas(steps) if told is None else list(told)

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        _refuse_guidance(guidance_scale)
        self.check_texts([prompt], text_length)
        texts, mask, slots = self.pipe.encode_prompt(prompt, device=self.pipe._execution_device)
        conditions = {
            "encoder_hidden_states": texts,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, *self.latent_size(size))]],
            "img_mask": torch.cat([slots, slots.new_ones(1, self.tokens(size) // 4)], dim=1),
        }
        longer = adapter_of(self.pipe).longer_texts(conditions, {True: text_length})
        return _Qwen21Velocity(self.pipe, conditions | longer, None)


class Chroma(Flux):
    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        guided = guidance_scale > 1
        device = self.pipe._execution_device
        texts, places, mask, *away = self.pipe.encode_prompt(
            prompt, "", device, do_classifier_free_guidance=guided, max_sequence_length=text_length
        )
        height, width = (side // self.multiple for side in size)
        image = {"img_ids": self.pipe._prepare_latent_image_ids(1, height, width, device, texts.dtype)}

        def conditions(texts: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
            seen = self.pipe._prepare_attention_mask(1, height * width, texts.dtype, mask)
            return {**image, "encoder_hidden_states": texts, "txt_ids": places, "attention_mask": seen}

        towards = FluxVelocity(self.pipe, conditions(texts, places, mask), None)
        if not guided:
            return towards
        return GuidedByTwoCalls(towards, FluxVelocity(self.pipe, conditions(*away), None, "uncond"), guidance_scale)
