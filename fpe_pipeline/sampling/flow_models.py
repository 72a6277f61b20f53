"""Flow models alone, by family: how each is called at a σ, what its pipeline's run is, and what is served.

Stable Diffusion 3 takes latents [B, C, h, w] and guides by a batch of both halves; FLUX.1 takes latents packed into
tokens [B, N, 4 · C] and is told the guidance; Qwen-Image and Chroma take such tokens too, and guide by a second call.
Z-Image takes lists of latents and of captions, and gives the velocity's opposite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..models.families import adapter_of
from .flow_model import FlowModel, Latents, Velocity, shift_of

__all__ = ["FlowModel", "Velocity", "check_served", "flow_model", "is_flow_model"]


class _SD3Velocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        return timestep.expand(latents.shape[0])


class _SD3(FlowModel):
    def text_tokens(self, text_length: int) -> int:
        return self.pipe.tokenizer_max_length + text_length

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size

    @property
    def longest(self) -> int | None:
        places = self.pipe.transformer.config.pos_embed_max_size
        return None if places is None else places * self.multiple

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        scheduler, options = self.pipe.scheduler, {}
        if scheduler.config.use_dynamic_shifting:
            options["mu"] = shift_of(scheduler, (size[0] // self.multiple) * (size[1] // self.multiple))
        scheduler.set_timesteps(steps, device=self.pipe._execution_device, **options)

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        guided = guidance_scale > 1
        texts, away, pooled, pooled_away = self.pipe.encode_prompt(
            prompt=prompt,
            prompt_2=None,
            prompt_3=None,
            device=self.pipe._execution_device,
            do_classifier_free_guidance=guided,
            max_sequence_length=text_length,
        )
        if guided:
            texts, pooled = torch.cat([away, texts]), torch.cat([pooled_away, pooled])
        conditions = {"encoder_hidden_states": texts, "pooled_projections": pooled}
        return _SD3Velocity(self.pipe, conditions, guidance_scale if guided else None)


class _FluxVelocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        return timestep.expand(latents.shape[0]).to(latents.dtype) / 1000


class _Flux(FlowModel):
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
        return _FluxVelocity(self.pipe, conditions, None)


class _Qwen(_Flux):
    is_padded = False
    takes_guidance = False

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
        return _FluxVelocity(self.pipe, conditions, None)


class _Chroma(_Flux):
    is_padded = False

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

        towards = _FluxVelocity(self.pipe, conditions(texts, places, mask), None)
        if not guided:
            return towards
        return _TwoCalls(towards, _FluxVelocity(self.pipe, conditions(*away), None, "uncond"), guidance_scale)


class _TwoCalls(Velocity):
    """A velocity that is guided by a second call, which other text takes.

    Args:
        towards, away: of the two texts.
        guidance_scale: how far.
    """

    def __init__(self, towards: Velocity, away: Velocity, guidance_scale: float) -> None:
        super().__init__(towards._pipe, towards.conditions, guidance_scale)
        self._calls = away, towards

    def __call__(self, latents: Latents, sigma: torch.Tensor) -> Latents:
        away, towards = (velocity(latents, sigma) for velocity in self._calls)
        self.arguments = self._calls[1].arguments
        assert self._guidance_scale is not None
        return away + self._guidance_scale * (towards - away)


class _ZImageVelocity(Velocity):
    def _given(self, latents: Latents, timestep: torch.Tensor) -> dict[str, Any]:
        given = latents.to(self._pipe.transformer.dtype)[:, :, None]  # of one frame
        turned = (1000 - timestep.expand(latents.shape[0])) / 1000
        return {"x": list(given.unbind()), "t": turned, **self.conditions}

    def _predicted(self) -> Latents:
        rows = self._pipe.transformer(**self.arguments, return_dict=False)[0]
        return -torch.stack([row[:, 0] for row in rows])


class _ZImage(FlowModel):
    is_padded = False

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
        if guidance_scale != 1:
            raise ValueError(
                "inversion on Z-Image, whose pipeline counts guidance from 0 where others count it from 1, is without, "
                f"got guidance_scale={guidance_scale:g}: leave it at 1, and guide the edits with guidance_scale"
            )
        captions, _ = self.pipe.encode_prompt(
            [prompt], self.pipe._execution_device, False, max_sequence_length=text_length
        )
        return _ZImageVelocity(self.pipe, {"cap_feats": captions}, None)


_FAMILIES: dict[str, type[FlowModel]] = {
    "sd3": _SD3,
    "flux": _Flux,
    "qwen": _Qwen,
    "chroma": _Chroma,
    "z_image": _ZImage,
}
#: Pipelines whose models are shown pictures, by what their names begin with.
_SHOWN = {"FluxKontext": "FLUX.1 Kontext", "QwenImageEdit": "Qwen-Image-Edit", "QwenImageLayered": "Qwen-Image-Layered"}
#: What families are called in messages.
_SERVED = "Stable Diffusion 3, FLUX.1, Qwen-Image, Chroma and Z-Image"


def is_flow_model(pipe: Any) -> bool:
    """Whether a pipeline's model is one of those that are described here."""
    return getattr(pipe, "transformer", None) is not None and adapter_of(pipe).family in _FAMILIES


def flow_model(pipe: Any) -> FlowModel:
    """The flow model of a pipeline.

    Raises:
        TypeError: a pipeline without one, with one of a family that no adapter describes, or that is not served here.
    """
    family = adapter_of(pipe).family
    if getattr(pipe, "transformer", None) is None:
        raise TypeError(
            f"expected a pipeline of {_SERVED}, got {type(pipe).__name__} with its "
            f"{type(pipe.unet).__name__}, whose steps are no flow: use FreePromptPipeline"
        )
    check_served(pipe, family)
    return _FAMILIES[family](pipe)


def check_served(pipe: Any, family: str) -> None:
    """Raise TypeError for a pipeline around a transformer of which this package has no convenience.

    Args:
        pipe: of diffusers.
        family: of its transformer.
    """
    where = "; put `with editing(pipe, edit):` around its calls, which edits what they generate"
    if family not in _FAMILIES:
        raise TypeError(
            f"real images, recordings and FreePromptPipeline are for {_SERVED}, got {type(pipe).__name__}{where}"
        )
    for name, said in _SHOWN.items():
        if any(kind.__name__.startswith(name) for kind in type(pipe).__mro__):
            raise TypeError(
                "real images, recordings and FreePromptPipeline hold no reference picture, which is part of every call "
                f"of {said}, got {type(pipe).__name__}{where}"
            )
