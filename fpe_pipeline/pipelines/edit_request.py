"""A call of `FreePromptPipeline`: what it was asked for, what follows from that before any denoising, and the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..edits import Edit
from ..edits.base import check_prompts
from ..errors import check_generator, check_guidance, check_positive
from ..inversion.follow import Followed, check_inversion_options
from ..inversion.trajectory import Inversion
from ..prompts.encoding import encoding_tokenizer
from ..prompts.words import warn_of_unknown_words
from ..sampling.arguments import check_embeddings, chosen_edit, image_size, negative_list, prompt_list
from ..sampling.output import FreePromptPipelineOutput
from ..sampling.pipeline import SamplingPipeline
from ..sampling.served_models import (
    check_guided_inversion,
    check_negative_sizes,
    check_options,
    check_pipeline,
    check_second_negative,
)
from ..sampling.step_end import Call, DropSource, Task, check_source_can_be_dropped
from ..session.finite import check_latents
from ..session.session import EditingSession, editing, session_of
from ..session.shared_noise import shared_latents

__all__ = ["EditPlan", "EditRequest"]


@dataclass(frozen=True, kw_only=True, eq=False)
class EditRequest:
    """What `FreePromptPipeline.__call__` was passed, which says what each field is."""

    prompt: str | Sequence[str] | None
    target_prompt: str | Sequence[str] | None
    self_replace_steps: Any
    levels: int | Iterable[int] | None
    max_tokens: int | None
    layers: str | int | Iterable[str | int] | None
    edit: Edit | None
    inversion: Inversion | None
    keep_source: bool
    backend: str
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    negative_prompt: str | Sequence[str] | None
    num_images_per_prompt: int
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    output_type: str
    callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    options: dict[str, Any]

    def plan(self, pipe: SamplingPipeline) -> EditPlan:
        """What the call comes to; the pipeline's scheduler is set to an inversion's run.

        Raises:
            TypeError, ValueError: what cannot be served, before any denoising.
        """
        check_generator(self.generator)
        check_pipeline(pipe)
        scale = pipe.parent_default("guidance_scale") if self.guidance_scale is None else self.guidance_scale
        return self._as_the_inversion_decides()._plan(pipe, scale)

    def _as_the_inversion_decides(self) -> EditRequest:
        """With the noise, steps and prompts of an inversion, and a number of steps in any case."""
        inversion = self.inversion
        if inversion is None:
            return replace(self, num_inference_steps=50) if self.num_inference_steps is None else self
        given = {"latents": self.latents, "negative_prompt_embeds": self.negative_prompt_embeds, **self.options}
        check_inversion_options(inversion, given, self.negative_prompt, self.num_inference_steps)
        unsaid = self.prompt is None and self.prompt_embeds is None
        return replace(
            self,
            prompt=inversion.prompt if unsaid else self.prompt,
            latents=inversion.noise,
            num_inference_steps=inversion.steps,
            negative_prompt=inversion.prompt if inversion.method == "negative-prompt" else self.negative_prompt,
        )

    def _plan(self, pipe: SamplingPipeline, guidance_scale: float) -> EditPlan:
        prompts = prompt_list(self.prompt, self.target_prompt, self.prompt_embeds)
        check_embeddings(None, prompt_embeds=self.prompt_embeds)
        count = len(prompts) if self.prompt_embeds is None else self.prompt_embeds.shape[0]
        check_embeddings(count, negative_prompt_embeds=self.negative_prompt_embeds)
        pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        check_embeddings(count, "channels", **{name: self.options.get(name) for name in pooled})
        edit = chosen_edit(self.edit, self.self_replace_steps, self.levels, self.max_tokens, self.layers, pipe.denoiser)
        self._check(pipe, edit, prompts, count, guidance_scale)
        further = {name: negative_list(self.options.get(name), count, name) for name in pipe.further_texts}
        images, channels = self.num_images_per_prompt, pipe.denoiser.config.in_channels
        latents = shared_latents(self.latents, count, images, channels)
        height, width = image_size(
            pipe.native_size, pipe.vae_scale_factor, self.height, self.width, latents, pipe.pixel_multiple
        )
        if count == 1 and session_of(pipe) is None:  # a session warns of those that it watches
            warn_of_unknown_words(prompts, pipe.tokenizer)
        if self.inversion is not None:
            check_guided_inversion(pipe, self.inversion.method)
            self.inversion.check(pipe.scheduler, guidance_scale)
            assert latents is not None
            # An image may be inverted in another; diffusers keeps what it gets.
            latents = latents.to(pipe.denoiser.dtype)
        call = Call(count, images)
        followed = Followed.of(pipe, call, self.inversion)
        arguments = {
            "prompt": prompts or None,
            "height": height,
            "width": width,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_list(self.negative_prompt, count),
            "num_images_per_prompt": images,
            "generator": self.generator,
            "latents": latents,
            "prompt_embeds": self.prompt_embeds,
            "negative_prompt_embeds": self.negative_prompt_embeds,
            "output_type": self.output_type,
            "callback_on_step_end": self.callback_on_step_end,
            "callback_on_step_end_tensor_inputs": self.callback_on_step_end_tensor_inputs,
            **self.options,
            **further,
        }
        return EditPlan(
            call=call,
            session=nullcontext()
            if count == 1
            else editing(pipe, edit, images_per_prompt=images, noise="separate", backend=self.backend),
            source=followed.source,
            tasks=followed.tasks if self.keep_source else (*followed.tasks, DropSource(call, edit)),
            arguments=arguments | followed.options,
            prompts=tuple(prompts),
            keep_source=self.keep_source,
        )

    def _check(
        self, pipe: SamplingPipeline, edit: Edit, prompts: Sequence[str], count: int, guidance_scale: float
    ) -> None:
        """Raise for what does not belong together."""
        if prompts:
            check_prompts(edit, prompts, encoding_tokenizer(pipe))
        check_positive(num_images_per_prompt=self.num_images_per_prompt, num_inference_steps=self.num_inference_steps)
        check_guidance(guidance_scale)
        negative = self.negative_prompt is not None and self.inversion is None
        check_options(pipe, guidance_scale, negative, self.options)
        check_second_negative(pipe, self.negative_prompt, self.options)
        check_negative_sizes(self.options, count * self.num_images_per_prompt)
        if not self.keep_source:
            check_source_can_be_dropped(pipe, count, self.options)
        check_latents(self.latents)


@dataclass(frozen=True, kw_only=True, eq=False)
class EditPlan:
    """A run that is ready.

    Args:
        call: which rows are whose.
        session: edits the run, in a ``with`` block around it.
        source: holds the source rows to an inverted image, in one around both.
        tasks: at the end of each step.
        arguments: of the sampling loop.
        prompts: the source's first; none where embeddings stand in for them.
        keep_source: whether the source's images are among those that come out.
    """

    call: Call
    session: AbstractContextManager[object]
    source: AbstractContextManager[object]
    tasks: tuple[Task, ...]
    arguments: dict[str, Any]
    prompts: tuple[str, ...]
    keep_source: bool

    def run(self, pipe: SamplingPipeline) -> tuple[Any, Any]:
        """The images, and whether each was censored (None where nothing looks)."""
        with self.source:
            images, nsfw = pipe._sample(self.call, self.session, self.tasks, **self.arguments)
        if not self.keep_source and not self.call.source_dropped:  # interrupted before the step at which it is dropped
            first = self.call.images_per_prompt
            return images[first:], nsfw and nsfw[first:]
        return images, nsfw

    def output(self, images: Any, nsfw: Any) -> FreePromptPipelineOutput:
        """What `run` returned, with what is known of it."""
        return FreePromptPipelineOutput(
            images=images,
            nsfw_content_detected=nsfw,
            images_per_prompt=self.call.images_per_prompt,
            source_kept=self.keep_source,
            prompts=self.prompts,
            report=self.session.report() if isinstance(self.session, EditingSession) else None,
        )
