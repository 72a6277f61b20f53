"""`FreePromptPipeline`: diffusers' `StableDiffusionPipeline` with an edit from one source prompt to many targets.

The parent's sampling loop runs unchanged inside an editing session. What is added here happens at the parent's own
extension points: the noise that it prepares is shared by all prompts, the scheduler's steps hold the source to an
inverted image, and the step callback drops the source rows once no later step needs them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from .edit_request import EditRequest
from .edits import Edit
from .embedded import embedded_path
from .inversion.trajectory import Inversion, invert
from .models.families import adapter_of
from .models.loading import is_embedded
from .recordings import record_run, replay_run
from .sampling.arguments import check_option_names
from .sampling.output import FreePromptPipelineOutput
from .sampling.pipeline import SamplingPipeline
from .sampling.served_models import check_model

if TYPE_CHECKING:
    from .flow_pipeline import FlowEditing

__all__ = ["FreePromptPipeline", "FreePromptPipelineOutput"]

# What the parent takes and this class hands on without looking; anything else is a misspelt name.
PARENT_OPTIONS = frozenset(inspect.signature(StableDiffusionPipeline.__call__).parameters) - {"self", "kwargs"}
LEGACY_OPTIONS = frozenset({"callback", "callback_steps"})


_ADOPTING = ContextVar("adopting", default=False)

#: Pipelines around transformers, as diffusers saves them and as ours save them, by family. Their modules, a second's
#: import, are imported with the first of them.
_OF_FLOWS = {
    "StableDiffusion3Pipeline": "sd3",
    "FreePromptSD3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "FreePromptFluxPipeline": "flux",
    "QwenImagePipeline": "qwen",
    "FreePromptQwenImagePipeline": "qwen",
    "ChromaPipeline": "chroma",
    "FreePromptChromaPipeline": "chroma",
    "ZImagePipeline": "z_image",
    "FreePromptZImagePipeline": "z_image",
}


class FreePromptPipeline(SamplingPipeline):
    """Edit an image, generated or real, into target prompts, by Free-Prompt-Editing or another edit.

    Loads, saves and offloads as any diffusers pipeline does: `from_pretrained`, `from_single_file`, `from_pipe`,
    `load_lora_weights`, `enable_model_cpu_offload`. What it saves, plain diffusers loads.

    Example:
        >>> pipe = FreePromptPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> out = pipe("a photo of a red car on the beach", ["a photo of a blue car on the beach"])
        >>> out.source.size == out.targets[0].size
        True

    A real image is inverted first:
        >>> from fpe_pipeline import ddim_scheduler
        >>> pipe.scheduler = ddim_scheduler(pipe.scheduler)
        >>> inversion = pipe.invert("beach.jpg", "a photo of a red car on the beach", method="direct")
        >>> out = pipe(inversion=inversion, target_prompt="a photo of a blue car on the beach")
    """

    @classmethod
    def from_pipe(cls, pipeline: Any, **components: Any) -> Any:
        """As in diffusers, but modules keep their dtypes; a model that this class does not serve is refused with the
        way to edit it. Around a transformer that is a `FreePromptSD3Pipeline`, `FreePromptFluxPipeline` or
        `FreePromptQwenImagePipeline`."""
        serving = _flow_class_of(pipeline)
        if serving is not None:
            return serving.from_pipe(pipeline, **components)
        unet, vae = (components.get(name, getattr(pipeline, name, None)) for name in ("unet", "vae"))
        if unet is not None and vae is not None:
            check_model(unet, vae)
        if {"dtype", "torch_dtype"} & components.keys():
            adopted: FreePromptPipeline = super().from_pipe(pipeline, **components)
            return adopted
        # diffusers' from_pipe casts to float32, and what it casts are the caller's own modules.
        token = _ADOPTING.set(True)
        try:
            adopted = super().from_pipe(pipeline, **components)
        finally:
            _ADOPTING.reset(token)
        return adopted

    def to(self, *arguments: Any, **options: Any) -> FreePromptPipeline:
        """As in diffusers; while a pipeline is made from another one, its modules stay as they are."""
        return self if _ADOPTING.get() else super().to(*arguments, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """As in diffusers; "embedded" and "embedded-sd3" are the models that come with this package. A saved pipeline
        of Stable Diffusion 3, FLUX.1, Qwen-Image, Chroma or Z-Image is loaded as the class that edits with it."""
        if isinstance(pretrained_model_name_or_path, str) and is_embedded(pretrained_model_name_or_path):
            pretrained_model_name_or_path = embedded_path(pretrained_model_name_or_path)
        serving: Any = _flow_class(pretrained_model_name_or_path, options)
        if serving is not None:
            return serving.from_pretrained(pretrained_model_name_or_path, **options)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

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
        guidance_scale: float = 7.5,
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
                alone is generated as `StableDiffusionPipeline` would. Default with `inversion`: its prompt.
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
            guidance_scale: classifier-free guidance; 1 or less switches it off.
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
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in `StableDiffusionPipeline`. With
                `inversion` the source's latents are those that it was put back onto. With `keep_source=False` tensors
                lose their source rows after the step at which these are dropped.
            **options: what else `StableDiffusionPipeline` takes: `eta`, `timesteps`, `sigmas`, `clip_skip`,
                `guidance_rescale`, `cross_attention_kwargs`, `ip_adapter_image`, `ip_adapter_image_embeds`.

        Raises:
            TypeError: an unknown option, or prompts that are not text.
            ValueError: an edit, a size, latents or a combination of arguments that cannot be served; before any
                denoising.
        """
        check_option_names(options, OWN_OPTIONS, PARENT_OPTIONS | LEGACY_OPTIONS)
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


OWN_OPTIONS = frozenset(inspect.signature(FreePromptPipeline.__call__).parameters) - {"self", "options"}


def _flow_class_of(pipeline: Any) -> type[FlowEditing] | None:
    """The class that edits with a pipeline's transformer; None for a pipeline with a UNet.

    Raises:
        TypeError: a transformer of a family that has no adapter, or a pipeline that is not served.
    """
    if getattr(pipeline, "transformer", None) is None or getattr(pipeline, "unet", None) is not None:
        return None
    family = adapter_of(pipeline).family
    from .flow_pipeline import FLOW_CLASSES
    from .sampling.flow_models import check_served

    check_served(pipeline, family)
    return FLOW_CLASSES[family]


def _flow_class(pretrained: Any, options: Mapping[str, Any]) -> type[FlowEditing] | None:
    """The class that edits with a saved pipeline; None for one with a UNet, or where none is found.

    Args:
        pretrained: as ``from_pretrained`` takes it.
        options: of that call.
    """
    hub = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
    try:
        config = StableDiffusionPipeline.load_config(
            pretrained, **{name: options[name] for name in hub if name in options}
        )
    except (OSError, ValueError):
        return None  # which from_pretrained says better
    family = _OF_FLOWS.get(str(config.get("_class_name", "")))
    if family is None:
        return None
    from .flow_pipeline import FLOW_CLASSES

    return FLOW_CLASSES[family]
