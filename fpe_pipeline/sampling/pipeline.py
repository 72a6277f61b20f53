"""diffusers' pipelines around a UNet, or a transformer with a UNet's kinds of layers, with what every run of ours needs
of them: under inversion and recordings too.

The parent's sampling loop runs unchanged. What is added happens at its own extension points: the noise that it prepares
is shared by all prompts, and its step callback is followed by our tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..prompts.words import short_form
from ..session.finite_watch import FiniteSteps
from ..session.session import EditingSession
from ..session.shared_noise import row_generators
from .parent import AroundParent
from .step_end import Call, StepEnd, Task
from .unet_conditions import UNetConditions

__all__ = ["SamplingPipeline"]


class SamplingPipeline(AroundParent, DiffusionPipeline):
    """A pipeline of diffusers whose calls share noise among prompts, and end each step with tasks.

    A class derives from this one first and from its pipeline of diffusers second.
    """

    #: The component that predicts noise.
    denoiser_name: ClassVar[str] = "unet"
    #: Text encoders and the rest, whose precision is checked.
    parts: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder")
    #: What the UNet is told beside a timestep and text, as its ``addition_embed_type`` says it.
    added_conditions: ClassVar[str | None] = None
    #: Texts of a call beside the prompts, one for all or a list with one for each.
    further_texts: ClassVar[tuple[str, ...]] = ()
    #: What of each row the parent's loop gives its callback no access to, in words; None where it gives all.
    kept_in_loop: ClassVar[str | None] = None
    #: Whether attention to text is masked where texts end.
    masks_text: ClassVar[bool] = False
    _call: Call | None = None

    @property
    def denoiser(self) -> Any:
        """The model that predicts noise."""
        return getattr(self, self.denoiser_name)

    @property
    def pixel_multiple(self) -> int:
        """Of what the sides of images are multiples, in pixels."""
        factor: int = self.vae_scale_factor
        return factor

    @property
    def text_tokens(self) -> int:
        """Of a prompt, with its padding."""
        tokens: int = self.tokenizer.model_max_length
        return tokens

    def conditions(self, prompt: str, guided: bool, size: tuple[int, int]) -> UNetConditions:
        """What the model is told of a prompt, of images of (height, width) pixels.

        Args:
            prompt: of one image.
            guided: whether an unconditional row stands before it.
            size: in pixels.
        """
        raise NotImplementedError

    def unconditional_options(self, embeddings: torch.Tensor) -> dict[str, Any]:
        """The options of a call that put embeddings [prompts, tokens, channels] into its unconditional half."""
        return {"negative_prompt_embeds": embeddings.to(self.denoiser.dtype)}

    @property
    def autoencoder_dtype(self) -> torch.dtype:
        """In which the autoencoder computes."""
        dtype: torch.dtype = self.vae.dtype
        return dtype

    @contextmanager
    def computing_autoencoder(self) -> Iterator[Any]:
        """The autoencoder in the dtype in which it computes, in a ``with`` block."""
        own, computing = self.vae.dtype, self.autoencoder_dtype
        try:
            yield self.vae if own is computing else self.vae.to(computing)
        finally:
            if own is not computing:
                self.vae.to(own)

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the model was trained for."""
        sample = self.denoiser.config.sample_size
        grid = (sample, sample) if isinstance(sample, int) else tuple(sample)
        return grid[0] * self.vae_scale_factor, grid[1] * self.vae_scale_factor

    def _sample(
        self,
        call: Call,
        session: AbstractContextManager[object],
        tasks: Sequence[Task],
        *,
        callback_on_step_end: Any,
        callback_on_step_end_tensor_inputs: Sequence[str],
        **arguments: Any,
    ) -> tuple[Any, Any]:
        """The parent's sampling loop inside ``session``, with ``tasks`` at the end of each step: the images, and
        whether each was censored (None where nothing looks)."""
        if tasks:
            callback_on_step_end = StepEnd(
                callback_on_step_end, callback_on_step_end_tensor_inputs, tasks, self._callback_tensor_inputs
            )
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._call = call
        try:
            watched = nullcontext() if isinstance(session, EditingSession) else FiniteSteps(self)
            with session, watched, _text_model_found(self.text_encoder):
                images, *censored = self._loop(
                    callback_on_step_end, list(callback_on_step_end_tensor_inputs), arguments
                )
            return images, censored[0] if censored else None
        finally:
            self._call = None

    def _loop(self, callback: Any, tensor_inputs: list[str], arguments: dict[str, Any]) -> tuple[Any, ...]:
        """The parent's call; ``callback`` takes and gives the tensors of its loop at the end of each step."""
        made: tuple[Any, ...] = super().__call__(
            return_dict=False,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=tensor_inputs,
            **arguments,
        )
        return made

    def maybe_convert_prompt(self, prompt: Any, tokenizer: Any) -> Any:
        """Tokens of several vectors written out, as diffusers does, and once where the caller did it already."""
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        converted = super().maybe_convert_prompt([short_form(text, tokenizer) for text in texts], tokenizer)
        return converted[0] if isinstance(prompt, str) else converted

    def prepare_latents(
        self,
        batch_size: int,
        channels: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Any,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Starting noise [batch, C, h, w]; during an edit, one draw for each image, the same for every prompt."""
        if self._call is None:
            return super().prepare_latents(batch_size, channels, height, width, dtype, device, generator, latents)
        rows = self._call.images_per_prompt
        noise = super().prepare_latents(rows, channels, height, width, dtype, device, generator, latents)
        return noise.repeat(self._call.prompts, 1, 1, 1)

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        """Options of `scheduler.step`; during an edit, stochastic samplers draw the same noise for every prompt."""
        options = super().prepare_extra_step_kwargs(generator, eta)
        if self._call is not None and self._call.prompts > 1 and "generator" in options:
            self._call.generators = row_generators(generator, self._call.prompts, self._call.images_per_prompt)
            options["generator"] = self._call.generators
        return options


@contextmanager
def _text_model_found(encoder: Any) -> Iterator[None]:
    """Let diffusers find the text encoder's final norm, for ``clip_skip``, where it looks for it: in ``text_model``.

    From version 5 of transformers on, a `CLIPTextModel` is that model itself.
    """
    if encoder is None or hasattr(encoder, "text_model") or not hasattr(encoder, "final_layer_norm"):
        yield
        return
    vars(encoder)["text_model"] = encoder  # not as a submodule: it would contain itself
    try:
        yield
    finally:
        del vars(encoder)["text_model"]
