"""Flow models that take latents packed into tokens [B, N, 4 · C]: FLUX.1 and FLUX.2 [dev], which are told their
guidance, and those that guide by a second call, FLUX.2 [klein], Qwen-Image and Chroma.

The latents of FLUX.2 are normalised by what its autoencoder saw on average (the statistics of a batch norm), once 2 × 2
of them are laid behind one another as channels; so its pipelines' calls take them, [B, 4 · C, h / 2, w / 2].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from ..models.flux2 import is_klein
from .flow_model import FlowModel, GuidedByTwoCalls, Latents, Velocity, shift_of

__all__ = ["Chroma", "Flux", "Flux2", "FluxVelocity", "Qwen"]


class FluxVelocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        return timestep.expand(latents.shape[0]).to(latents.dtype) / 1000


class Flux(FlowModel):
    is_packed = True

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * 2

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        self.pipe.scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / steps, steps),
            mu=shift_of(self.pipe.scheduler, (size[0] // self.multiple) * (size[1] // self.multiple)),
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
        mean, spread = self._moments(grid)
        return (grid - mean) / spread

    def _moments(self, grid: Latents) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel of a grid [B, 4 · C, …], as its autoencoder knows them."""
        vae = self.pipe.vae
        mean, variance = (given.view(1, -1, 1, 1) for given in (vae.bn.running_mean, vae.bn.running_var))
        return mean.to(grid), torch.sqrt(variance + vae.config.batch_norm_eps).to(grid)

    def latents(self, encoded: Latents) -> Latents:
        return self.held(encoded)

    def unpacked(self, latents: Latents, size: tuple[int, int] | None = None) -> Latents:
        if size is None:
            raise ValueError("expected the size of the images, which latents packed into tokens do not say, got None")
        grid = self.taken(latents, size)
        mean, spread = self._moments(grid)
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


class Qwen(Flux):
    trimmed = frozenset({"text-key"})  # what asks, and values, an edit may take of padding too
    takes_guidance = False

    def own_text_tokens(self, prompt: str, text_length: int, *, conditional: bool = True) -> int:
        tokens = self.pipe.tokenizer(self.pipe.prompt_template_encode.format(prompt))["input_ids"]
        return min(len(tokens) - self.pipe.prompt_template_encode_start_idx, text_length)

    @property
    def latent_channels(self) -> int:
        return int(self.pipe.vae.config.z_dim)

    def encoded(self, pixels: torch.Tensor) -> Latents:
        config = self.pipe.vae.config
        mean = self.pipe.vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]  # of a video of one frame
        shift, spread = (mean.new_tensor(each) for each in (config.latents_mean, config.latents_std))
        return (mean - shift[:, None, None]) / spread[:, None, None]

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        if guidance_scale > 1:
            raise ValueError(
                "Qwen-Image guides by a negative prompt, which an inversion has none of, got "
                f"guidance_scale={guidance_scale:g}: leave it at 1, and guide the edits with true_cfg_scale"
            )
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
