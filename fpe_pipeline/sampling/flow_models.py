"""Flow models alone, outside their pipelines' loops: the run that a pipeline would make, and its velocity at any σ.

Stable Diffusion 3 takes latents [B, C, h, w] and guides by a batch of both halves; FLUX.1 takes latents packed into
tokens [B, N, 4 · C] and is told the guidance; Qwen-Image takes such tokens too, and guides by a second call.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import torch

from ..models.families import adapter_of

__all__ = ["FlowModel", "Velocity", "check_served", "flow_model", "is_flow_model"]

Latents = torch.Tensor


class Velocity(ABC):
    """v(z, σ) of a model with a prompt: what it predicts, guided as it was said.

    Args:
        pipe: whose model it is.
        conditions: keyword arguments of every call of the model, of one row or, guided, of both halves.
        guidance_scale: of the two halves; None where the batch has one.

    Attributes:
        arguments: keyword arguments of the latest call.
    """

    def __init__(self, pipe: Any, conditions: dict[str, Any], guidance_scale: float | None) -> None:
        self._pipe, self.conditions, self._guidance_scale = pipe, conditions, guidance_scale
        self.arguments: dict[str, Any] = {}

    def __call__(self, latents: Latents, sigma: torch.Tensor) -> Latents:
        """The velocity [1, …] in the dtype of ``latents`` [1, …], which the model receives in its own.

        Args:
            latents: as the model takes them.
            sigma: a number in [0, 1], of the scheduler's dtype, on the CPU.
        """
        timestep = (sigma * self._pipe.scheduler.config.num_train_timesteps).to(latents.device)
        rows = 1 if self._guidance_scale is None else 2
        given = latents.to(self.conditions["encoder_hidden_states"].dtype).expand(rows, *latents.shape[1:])
        self.arguments = {"hidden_states": given, "timestep": self._timestep(timestep, given), **self.conditions}
        model = self._pipe.transformer
        context = model.cache_context("cond") if hasattr(model, "cache_context") else nullcontext()
        with context:
            predicted = model(**self.arguments, return_dict=False)[0].to(latents.dtype)
        if self._guidance_scale is None:
            return predicted
        away, towards = predicted.chunk(2)
        return away + self._guidance_scale * (towards - away)

    @abstractmethod
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        """The scheduler's timestep as the model takes it [rows]."""


class FlowModel(ABC):
    """A pipeline's flow model.

    Args:
        pipe: of diffusers; its scheduler is one of :mod:`..models.flow_solvers`.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the pipeline makes by default."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    @property
    def text_length(self) -> int:
        """Tokens of T5 that the pipeline takes by default."""
        pipeline = getattr(self.pipe, "parent", type(self.pipe))  # ours say of these options what diffusers' says
        return inspect.signature(pipeline.__call__).parameters["max_sequence_length"].default

    def text_tokens(self, text_length: int) -> int:
        """Tokens of a prompt in joint attention, with so many of T5."""
        return text_length

    @property
    @abstractmethod
    def multiple(self) -> int:
        """Pixels across a token."""

    @abstractmethod
    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        """Set the scheduler to the run that the pipeline makes of an image of (height, width) pixels."""

    #: Whether latents are packed into tokens.
    is_packed: ClassVar[bool] = False

    #: Whether every prompt has as many tokens of text, as recordings need it.
    is_padded: ClassVar[bool] = True

    @property
    def latent_channels(self) -> int:
        """Channels of the autoencoder's latents."""
        return int(self.pipe.vae.config.latent_channels)

    def encoded(self, pixels: torch.Tensor) -> Latents:
        """The mean of the autoencoder's distribution for pixels [1, 3, h, w] in [-1, 1], scaled: [1, C, h, w]."""
        config = self.pipe.vae.config
        mean = self.pipe.vae.encode(pixels).latent_dist.mean
        return (mean - (config.shift_factor or 0.0)) * config.scaling_factor

    def latents(self, encoded: Latents) -> Latents:
        """Latents [1, C, h, w] of the autoencoder, scaled, as the model takes them."""
        return encoded

    def unpacked(self, latents: Latents, size: tuple[int, int] | None = None) -> Latents:
        """The autoencoder's latents [B, C, h, w], scaled, of what the model takes: the inverse of :meth:`latents`.

        Args:
            latents: of any number of images.
            size: (height, width) of the images in pixels; needed where latents are packed.
        """
        return latents

    def channels(self, latent_channels: int) -> int:
        """Channels of what the model takes, of latents of so many."""
        return latent_channels

    @abstractmethod
    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        """The velocity with a prompt, of images of (height, width) pixels."""


class _SD3Velocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        return timestep.expand(latents.shape[0])


class _SD3(FlowModel):
    def text_tokens(self, text_length: int) -> int:
        return self.pipe.tokenizer_max_length + text_length

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        scheduler, options = self.pipe.scheduler, {}
        if scheduler.config.use_dynamic_shifting:
            options["mu"] = _mu(scheduler, (size[0] // self.multiple) * (size[1] // self.multiple))
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
            mu=_mu(self.pipe.scheduler, (size[0] // self.multiple) * (size[1] // self.multiple)),
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


_FAMILIES: dict[str, type[FlowModel]] = {"sd3": _SD3, "flux": _Flux, "qwen": _Qwen}
#: What families are called in messages.
_SERVED = "Stable Diffusion 3, FLUX.1 and Qwen-Image"


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
    if any(kind.__name__.startswith("FluxKontext") for kind in type(pipe).__mro__):
        raise TypeError(
            "real images, recordings and FreePromptPipeline hold no reference picture, which is part of every call of "
            f"FLUX.1 Kontext, got {type(pipe).__name__}{where}"
        )


def _mu(scheduler: Any, tokens: int) -> float:
    """The shift of a scheduler's σ for an image of so many tokens: linear in them, as diffusers' pipelines have it."""
    fewest, most, least, largest = (
        scheduler.config[name] for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    )
    slope = (largest - least) / (most - fewest)
    return float(tokens * slope + (least - slope * fewest))
