"""What `FreePromptPipeline` is around any UNet, and around a transformer with such layers: an edit from one source
prompt to many targets.

The parent's sampling loop runs unchanged inside an editing session. What is added here happens at the parent's own
extension points: the noise that it prepares is shared by all prompts, the scheduler's steps hold the source to an
inverted image, and the step callback drops the source rows once no later step needs them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..edits import Edit
from ..inversion.trajectory import Inversion, invert
from ..recordings import record_run, replay_run
from ..sampling.arguments import check_option_names
from ..sampling.output import FreePromptPipelineOutput
from ..sampling.pipeline import SamplingPipeline
from ..sampling.served_models import check_model
from .edit_request import EditRequest

__all__ = ["UNetEditing"]

_LEGACY_OPTIONS = frozenset({"callback", "callback_steps"})
_ADOPTING = ContextVar("adopting", default=False)


class UNetEditing(SamplingPipeline):
    """Edits of images, generated or real, on a pipeline of diffusers around a UNet or a model with such layers."""

    @classmethod
    def parent_options(cls) -> frozenset[str]:
        """What the parent takes and this class hands on without looking; anything else is a misspelt name."""
        return frozenset(inspect.signature(cls.parent.__call__).parameters) - {"self", "kwargs"}

    @classmethod
    def from_pipe(cls, pipeline: Any, **components: Any) -> Any:
        """As in diffusers, but modules keep their dtypes; a model that this class does not serve is refused with the
        way to edit it."""
        names = (cls.denoiser_name, "vae")
        model, vae = (components.get(name, getattr(pipeline, name, None)) for name in names)
        if model is not None and vae is not None:
            check_model(model, vae, cls.added_conditions)
        if {"dtype", "torch_dtype"} & components.keys():
            return super().from_pipe(pipeline, **components)
        # diffusers' from_pipe casts to float32, and what it casts are the caller's own modules.
        token = _ADOPTING.set(True)
        try:
            return super().from_pipe(pipeline, **components)
        finally:
            _ADOPTING.reset(token)

    def to(self, *arguments: Any, **options: Any) -> Any:
        """As in diffusers; while a pipeline is made from another one, its modules stay as they are."""
        return self if _ADOPTING.get() else super().to(*arguments, **options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        target_prompt: str | Sequence[str] | None = None,
        *,
        self_replace_steps: Any = 0.8,
        levels: int | Iterable[int] | None = None,
        max_tokens: int | None = None,
        layers: str | int | Iterable[str | int] | None = None,
        edit: Edit | None = None,
        inversion: Inversion | None = None,
        keep_source: bool = True,
        backend: str = "auto",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options: Any,
    ) -> FreePromptPipelineOutput | tuple[Any, Any]:
        """Make the source image and its edits, all from the same noise: a `FreePromptPipelineOutput`, or a tuple.

        Args:
            prompt: the source prompt; or, without `target_prompt`, a list of the source and its targets. A source
                alone is generated as the pipeline of diffusers would. Default with `inversion`: its prompt.
            target_prompt: one or more prompts to edit the source into.
            self_replace_steps: steps whose self-attention maps are the source's, as fractions of the run: s is
                (0, s). The default 0.8 is the first 80 % of the steps; 0 generates without control.
            levels, max_tokens, layers: at most one, to choose the replaced layers; see `FreePromptEdit`. Default:
                levels from 1 on, or, in a model of at most 32² tokens, all.
            edit: another edit, in place of the `FreePromptEdit` that the four arguments above make. One that aligns
                words is written for these very prompts.
            inversion: a real image, from `invert`, as the source: denoising starts from its noise, and the source rows
                follow it as its method says. It decides latents, size and number of steps, and where its method
                lives in the unconditional half, the negative prompts.
            keep_source: False drops the source rows after the last step that needs them, which saves their share of
                the remaining steps and their image; the targets are the same to rounding.
            backend: attention backend, a key of `fpe_kernels.backends()` or "auto".
            height, width: pixels, multiples of the autoencoder's factor; default: those of `latents`, else the UNet's.
            num_inference_steps: denoising steps; default: those of `inversion`, else 50.
            guidance_scale: classifier-free guidance; 1 or less switches it off. Default: diffusers' for this pipeline,
                7.5, of SDXL 5.
            negative_prompt: one for all prompts, or a list with one for each, the source's first.
            num_images_per_prompt: images k of every prompt; image i of a target is an edit of image i of the source.
            generator: one, or a list of k. Prompts share its noise, also that which stochastic samplers add in
                each step.
            latents: noise [1, C, h, w] for everything, [k, C, h, w] with one row an image, or [prompts · k, C, h, w]
                in the order of the images, where rows of the same image must be equal: an edit whose source starts
                elsewhere has no layout to keep. (`editing` around any pipeline sets no such rule.)
            prompt_embeds, negative_prompt_embeds: [prompts, tokens, channels] in place of prompts, the source's first.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns the tuple (images, nsfw_content_detected).
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in diffusers. With
                `inversion` the source's latents are those that it was put back onto. With `keep_source=False` tensors
                lose their source rows after the step at which these are dropped.
            **options: what else the pipeline of diffusers takes: `eta`, `timesteps`, `sigmas`, `clip_skip`,
                `guidance_rescale`, `cross_attention_kwargs`, `ip_adapter_image`, `ip_adapter_image_embeds`; of SDXL
                also `denoising_end`, the sizes that it is told, such as `original_size`, `pooled_prompt_embeds` and
                `negative_pooled_prompt_embeds`, and `prompt_2` and `negative_prompt_2`, each one for all prompts or a
                list with one for each.

        Raises:
            TypeError: an unknown option, or prompts that are not text.
            ValueError: an edit, a size, latents or a combination of arguments that cannot be served; before any
                denoising.
        """
        check_option_names(options, _OWN_OPTIONS, self.parent_options() | _LEGACY_OPTIONS)
        request = EditRequest(
            prompt=prompt, target_prompt=target_prompt, self_replace_steps=self_replace_steps, levels=levels,
            max_tokens=max_tokens, layers=layers, edit=edit, inversion=inversion, keep_source=keep_source,
            backend=backend, height=height, width=width, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt, generator=generator, latents=latents,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs, options=options,
        )  # fmt: skip
        plan = request.plan(self)
        images, nsfw = plan.run(self)
        return plan.output(images, nsfw) if return_dict else (images, nsfw)

    invert = invert
    record = record_run.record
    edit = replay_run.edit


_OWN_OPTIONS = frozenset(inspect.signature(UNetEditing.__call__).parameters) - {"self", "options"}
