"""diffusers' Stable Diffusion pipeline with what every run of ours needs of it: under inversion and recordings too.

The parent's sampling loop runs unchanged. What is added happens at its own extension points: the noise that it prepares
is shared by all prompts, and its step callback is followed by our tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from ..prompts.words import short_form
from ..session.finite_watch import FiniteSteps
from ..session.session import EditingSession
from ..session.shared_noise import row_generators
from .arguments import check_size
from .step_end import Call, StepEnd, Task

__all__ = ["SamplingPipeline"]


class SamplingPipeline(StableDiffusionPipeline):
    """A `StableDiffusionPipeline` whose calls share noise among prompts, and end each step with tasks."""

    _call: Call | None = None

    @property
    def progress_is_hidden(self) -> bool:
        """Whether ``set_progress_bar_config(disable=True)`` asked for silence."""
        return bool(getattr(self, "_progress_bar_config", {}).get("disable"))

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the UNet was trained for."""
        sample = self.unet.config.sample_size
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
        """The parent's sampling loop inside ``session``, with ``tasks`` at the end of each step."""
        if tasks:
            callback_on_step_end = StepEnd(
                callback_on_step_end, callback_on_step_end_tensor_inputs, tasks, self._callback_tensor_inputs
            )
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._call = call
        try:
            watched = nullcontext() if isinstance(session, EditingSession) else FiniteSteps(self)
            with session, watched, _text_model_found(self.text_encoder):
                return super().__call__(
                    return_dict=False,
                    callback_on_step_end=callback_on_step_end,
                    callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
                    **arguments,
                )
        finally:
            self._call = None

    def check_inputs(self, prompt: Any, height: int, width: int, *args: Any, **kwargs: Any) -> None:
        """The parent's checks, with the size measured against this autoencoder rather than against 8 pixels."""
        check_size(height, width, self.vae_scale_factor)
        super().check_inputs(prompt, 8, 8, *args, **kwargs)

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

    def to_json_string(self) -> str:
        """The configuration that `save_pretrained` writes; it names diffusers' class, so that diffusers loads it."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = StableDiffusionPipeline.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


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
