"""A flow model alone, outside its pipeline's loop: the run that the pipeline would make, and its velocity at any σ."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor

from .arguments import check_size

__all__ = ["FlowModel", "GuidedByTwoCalls", "Latents", "NormedGuidance", "Velocity", "check_unguided", "shift_of"]

Latents = torch.Tensor


class Velocity:
    """v(z, σ) of a model with a prompt: what it predicts, guided as it was said.

    Args:
        pipe: whose model it is.
        conditions: keyword arguments of every call of the model, of one row or, guided, of both halves.
        guidance_scale: of the two halves; None where the batch has one.
        name: of its calls, for models that diffusers' pipelines tell which of several a call is.

    Attributes:
        arguments: keyword arguments of the latest call.
    """

    def __init__(self, pipe: Any, conditions: dict[str, Any], guidance_scale: float | None, name: str = "cond") -> None:
        self._pipe, self.conditions, self._guidance_scale, self._name = pipe, conditions, guidance_scale, name
        self.arguments: dict[str, Any] = {}

    def __call__(self, latents: Latents, sigma: torch.Tensor) -> Latents:
        """The velocity [1, …] in the dtype of ``latents`` [1, …], which the model receives in its own.

        Args:
            latents: as the model takes them.
            sigma: a number in [0, 1], of the scheduler's dtype, on the CPU.
        """
        timestep = self._told(sigma).to(latents.device)
        rows = 1 if self._guidance_scale is None else 2
        self.arguments = self._given(latents.expand(rows, *latents.shape[1:]), timestep)
        with self._named_call():
            predicted = self._predicted().to(latents.dtype)
        if self._guidance_scale is None:
            return predicted
        away, towards = predicted.chunk(2)
        return away + self._guidance_scale * (towards - away)

    def _told(self, sigma: torch.Tensor) -> torch.Tensor:
        """The scheduler's timestep at σ."""
        timestep: torch.Tensor = sigma * self._pipe.scheduler.config.num_train_timesteps
        return timestep

    def _given(self, latents: Latents, timestep: torch.Tensor) -> dict[str, Any]:
        """What the model is called with, for latents [rows, …] and the scheduler's timestep."""
        given = latents.to(self.conditions["encoder_hidden_states"].dtype)
        return {"hidden_states": given, "timestep": self._timestep(timestep, given), **self.conditions}

    def _predicted(self) -> Latents:
        """The velocities [rows, …] that the model predicts for :attr:`arguments`."""
        predicted: Latents = self._pipe.transformer(**self.arguments, return_dict=False)[0]
        return predicted

    def _named_call(self) -> AbstractContextManager[Any]:
        model = self._pipe.transformer
        return model.cache_context(self._name) if hasattr(model, "cache_context") else nullcontext()

    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        """The scheduler's timestep as the model takes it [rows]."""
        raise NotImplementedError


class GuidedByTwoCalls(Velocity):
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
        return self._guided(away, towards)

    def _guided(self, away: Latents, towards: Latents) -> Latents:
        """What the pipeline makes of both [1, …]."""
        assert self._guidance_scale is not None
        return away + self._guidance_scale * (towards - away)


class NormedGuidance(GuidedByTwoCalls):
    """Guidance whose result is scaled to be as long as what is guided, in each row of pixels or token."""

    def _guided(self, away: Latents, towards: Latents) -> Latents:
        guided = super()._guided(away, towards)
        scaled: Latents = guided * (towards.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return scaled


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
        """Tokens of T5 that the pipeline takes by default; 0 where a text has as many as it has."""
        pipeline = getattr(self.pipe, "parent", type(self.pipe))  # ours say of these options what diffusers' says
        return int(inspect.signature(pipeline.__call__).parameters["max_sequence_length"].default)

    def text_tokens(self, text_length: int) -> int:
        """Tokens of a prompt in joint attention, with so many of T5 and with padding."""
        return text_length

    def own_text_tokens(self, prompt: str, text_length: int, *, conditional: bool = True) -> int:
        """Those of them that are no padding, where texts end where they end; of a negative prompt, or a prompt."""
        return self.text_tokens(text_length)

    def beside(self, source: str, targets: Sequence[str], text_length: int) -> AbstractContextManager[None]:
        """What gives the texts of targets, which are encoded alone in a block, the tokens that they have beside their
        source's; ValueError where the source's would have others beside theirs."""
        return nullcontext()

    def filling_tokens(self, size: tuple[int, int]) -> int:
        """Tokens beside the text's that fill up an image of (height, width) pixels and are attended to."""
        return 0

    def seen_apart(self, inverted: str, length: int, prompts: Sequence[str], text_length: int) -> str | None:
        """What differs between an image whose prompt stood alone while it was inverted and the same beside others,
        after "it"; None of most models, whose texts do not change one another.

        Args:
            inverted: the prompt of an inversion.
            length: the tokens that texts had then, as `text_length` counts them.
            prompts: of a call, its source's among them.
            text_length: the tokens that texts have in the call.
        """
        return None

    def check_texts(self, prompts: Sequence[str], text_length: int) -> None:  # noqa: B027  most are cut
        """Raise ValueError for prompts that do not go into so many tokens and that the pipeline does not cut."""

    def check_recorded(self, parts: Collection[str], is_guided: bool) -> None:  # noqa: B027
        """Raise ValueError for parts of tokens, such as "text-query", that the model does not compute, or for guidance
        by which some calls compute none."""

    @property
    @abstractmethod
    def multiple(self) -> int:
        """Pixels of which an image's sides are multiples: those across a token, or across several."""

    def tokens(self, size: tuple[int, int]) -> int:
        """Tokens of an image of (height, width) pixels."""
        return (size[0] // self.multiple) * (size[1] // self.multiple)

    @property
    def longest(self) -> int | None:
        """Pixels of the longest side that the model has places for; None where it computes them for any."""
        return None

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of all images that the pipeline makes; () where it makes any."""
        return ()

    def fitting(self, picture: tuple[int, int]) -> tuple[int, int] | None:
        """(width, height) of the image that a picture of (width, height) is cut to; None where that follows from its
        shape and the model's own number of pixels."""
        nearest = min(self.sizes, key=lambda size: abs(size[1] / size[0] - picture[0] / picture[1]), default=None)
        return None if nearest is None else (nearest[1], nearest[0])

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError for (height, width) in pixels that the model does not make."""
        check_size(*size, self.multiple)
        if self.sizes and tuple(size) not in self.sizes:
            known = ", ".join(f"{height} x {width}" for height, width in self.sizes)
            raise ValueError(
                f"height and width must be one of {known}, of which alone {self.pipe.parent.__name__} makes images, "
                f"got {size[0]} x {size[1]} (height x width)"
            )
        if self.longest is not None and max(size) > self.longest:
            raise ValueError(
                f"height and width must be at most {self.longest} pixels, for which this model has places, got "
                f"{size[0]} x {size[1]} (height x width): choose a smaller size, or cut the picture to another shape"
            )

    @abstractmethod
    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        """Set the scheduler to the run that the pipeline makes of an image of (height, width) pixels."""

    #: Whether latents are packed into tokens where the pipeline's call takes them.
    is_packed: ClassVar[bool] = False

    #: Parts of text tokens that recordings hold without the padding behind them.
    trimmed: ClassVar[frozenset[str]] = frozenset()

    #: Whether the pipeline takes the shift off latents that the autoencoder's settings may say.
    takes_shift: ClassVar[bool] = True

    #: What the guidance is counted in that a model is told.
    guidance_unit: ClassVar[float] = 1.0

    #: Whether the pipeline takes a ``guidance_scale`` that does something.
    takes_guidance: ClassVar[bool] = True

    @property
    def latent_pixels(self) -> int:
        """Pixels across one of the latents [B, C, h, w] that the pipeline's call takes."""
        return int(self.pipe.vae_scale_factor)

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the autoencoder's latents of an image of (height, width) pixels."""
        factor = int(self.pipe.vae_scale_factor)
        return size[0] // factor, size[1] // factor

    @property
    def latent_channels(self) -> int:
        """Channels of the autoencoder's latents."""
        return int(self.pipe.vae.config.latent_channels)

    @property
    def head_dim(self) -> int:
        """D, of a head of the model's attention."""
        return int(self.pipe.transformer.config.attention_head_dim)

    @property
    def key_heads(self) -> int | None:
        """Heads of keys and values; None where they are as many as those of queries."""
        return None

    @property
    def noise_dtype(self) -> torch.dtype:
        """Of the noise that the pipeline draws."""
        dtype: torch.dtype = self.pipe.transformer.dtype
        return dtype

    def encoded(self, pixels: torch.Tensor) -> Latents:
        """The mean of the autoencoder's distribution for pixels [1, 3, h, w] in [-1, 1], scaled: [1, C, h, w]."""
        config = self.pipe.vae.config
        mean = self.pipe.vae.encode(pixels).latent_dist.mean
        scaled: Latents = (mean - (config.shift_factor or 0.0)) * config.scaling_factor
        return scaled

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

    def drawn(self, size: tuple[int, int], generator: Any = None) -> Latents:
        """Noise of an image of (height, width) pixels, as the pipeline draws it and its call takes it."""
        shape = (1, self.latent_channels, *self.latent_size(size))
        noise = randn_tensor(shape, generator, self.pipe._execution_device, self.noise_dtype)
        return self.latents(noise)

    def cast(self, latents: Latents) -> Latents:
        """Latents of any dtype as the pipeline's call takes them; most pipelines convert them themselves."""
        return latents

    def held(self, latents: Latents) -> Latents:
        """Latents [B, …] as the pipeline's call takes them, as its scheduler and its model do."""
        return latents

    def taken(self, held: Latents, size: tuple[int, int]) -> Latents:
        """The inverse of :meth:`held`, of images of (height, width) pixels."""
        return held

    @property
    def in_channels(self) -> int:
        """Channels of what the model takes."""
        return int(self.pipe.transformer.config.in_channels)

    def channels(self, latent_channels: int) -> int:
        """Channels of what the model takes, of latents of so many."""
        return latent_channels

    @abstractmethod
    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        """The velocity with a prompt, of images of (height, width) pixels."""


def check_unguided(guidance_scale: float, name: str) -> None:
    """Raise ValueError for a guided inversion on a model, of this name, whose pipeline counts guidance from 0."""
    if guidance_scale != 1:
        raise ValueError(
            f"inversion on {name}, whose pipeline counts guidance from 0 where others count it from 1, is without, got "
            f"guidance_scale={guidance_scale:g}: leave it at 1, and guide the edits with guidance_scale"
        )


def shift_of(scheduler: Any, tokens: int) -> float:
    """The shift of a scheduler's σ for an image of so many tokens: linear in them, as diffusers' pipelines have it."""
    fewest, most, least, largest = (
        scheduler.config[name] for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    )
    slope = (largest - least) / (most - fewest)
    return float(tokens * slope + (least - slope * fewest))
