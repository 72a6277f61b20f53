"""`FreePromptPipeline`: diffusers' `StableDiffusionPipeline` with an edit from one source prompt to many targets.

The parent's sampling loop runs unchanged inside an editing session. What is added here happens at the parent's own
extension points: the noise that it prepares is shared by all prompts, and its step callback drops the source rows
once no later step needs them.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from .edits import Edit, FreePromptEdit
from .noise import row_generators, shared_latents
from .schedule import Step
from .session import editing

__all__ = ["FreePromptPipeline", "FreePromptPipelineOutput"]

# What the parent takes and this class hands on without looking; anything else is a misspelt name.
PARENT_OPTIONS = frozenset(inspect.signature(StableDiffusionPipeline.__call__).parameters) - {"self", "kwargs"}
LEGACY_OPTIONS = frozenset({"callback", "callback_steps"})


@dataclass
class FreePromptPipelineOutput(StableDiffusionPipelineOutput):
    """Images of one call, in prompt order.

    Args:
        images: list of PIL images, or array or tensor with a row an image, as `output_type` asks: the source's
            (where it is kept), then each target's. With `num_images_per_prompt` k, k images a prompt.
        nsfw_content_detected: a bool an image, or None without a safety checker.
        images_per_prompt: the k of the call.
        source_kept: whether `images` begins with the source's.
    """

    images_per_prompt: int = 1
    source_kept: bool = True

    @property
    def source(self) -> Any:
        """The source's image (with several images per prompt: all of them), or None where it was dropped."""
        return self._of_prompt(0) if self.source_kept else None

    @property
    def targets(self) -> list[Any]:
        """For each target prompt its image (with several images per prompt: all of them)."""
        prompts = len(self.images) // self.images_per_prompt
        return [self._of_prompt(index) for index in range(int(self.source_kept), prompts)]

    def _of_prompt(self, index: int) -> Any:
        first = index * self.images_per_prompt
        return (
            self.images[first] if self.images_per_prompt == 1 else self.images[first : first + self.images_per_prompt]
        )


@dataclass
class _Call:
    """What the parent's extension points need to know of the call that they serve."""

    prompts: int
    images_per_prompt: int
    generators: list[torch.Generator] = field(default_factory=list)
    source_dropped: bool = False


class FreePromptPipeline(StableDiffusionPipeline):
    """Generate an image of a source prompt and edit it into target prompts, by Free-Prompt-Editing or another edit.

    Loads, saves and offloads as any diffusers pipeline does: `from_pretrained`, `from_single_file`, `from_pipe`,
    `load_lora_weights`, `enable_model_cpu_offload`. What it saves, plain diffusers loads.

    Example:
        >>> pipe = FreePromptPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> out = pipe("a photo of a red car on the beach", ["a photo of a blue car on the beach"])
        >>> out.source, out.targets[0]
    """

    _call: _Call | None = None

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
        keep_source: bool = True,
        backend: str = "auto",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options: Any,
    ) -> FreePromptPipelineOutput | tuple:
        """Make the source image and its edits; all prompts start from the same noise.

        Args:
            prompt: the source prompt; or, without `target_prompt`, a list of the source and its targets. A source
                alone is generated as `StableDiffusionPipeline` would.
            target_prompt: one or more prompts to edit the source into.
            self_replace_steps: steps whose self-attention maps are the source's, as fractions of the run: s is
                (0, s). The default 0.8 is the first 80 % of the steps; 0 generates without control.
            levels, max_tokens, layers: at most one, to choose the replaced layers; see `FreePromptEdit`.
            edit: another edit, in place of the `FreePromptEdit` that the four arguments above make.
            keep_source: False drops the source rows after the last step that needs them, which saves their share of
                the remaining steps and their image; the targets are the same to rounding.
            backend: attention backend, a key of `fpe_kernels.backends()` or "auto".
            height, width: pixels, multiples of the autoencoder's factor; default: those of `latents`, else the UNet's.
            num_inference_steps: denoising steps.
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
                `keep_source=False` tensors lose their source rows after the step at which these are dropped.
            **options: what else `StableDiffusionPipeline` takes: `eta`, `timesteps`, `sigmas`, `clip_skip`,
                `guidance_rescale`, `cross_attention_kwargs`, `ip_adapter_image`, `ip_adapter_image_embeds`.

        Returns:
            `FreePromptPipelineOutput`, or a tuple.

        Raises:
            TypeError: an unknown option, or prompts that are not text.
            ValueError: an edit, a size, latents or a combination of arguments that cannot be served; before any
                denoising.
        """
        unknown = options.keys() - PARENT_OPTIONS - LEGACY_OPTIONS
        if unknown:
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}; expected one of {sorted(PARENT_OPTIONS)}")
        prompts = _prompt_list(prompt, target_prompt, prompt_embeds)
        count = len(prompts) if prompt_embeds is None else prompt_embeds.shape[0]
        edit = _chosen_edit(edit, self_replace_steps, levels, max_tokens, layers)
        _check_positive(num_images_per_prompt=num_images_per_prompt, num_inference_steps=num_inference_steps)
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, received {guidance_scale}")
        if not keep_source:
            self._check_source_can_be_dropped(count, options)
        latents = shared_latents(latents, count, num_images_per_prompt, self.unet.config.in_channels)
        height, width = self._image_size(height, width, latents)

        call = _Call(count, num_images_per_prompt)
        if not keep_source:
            callback_on_step_end, callback_on_step_end_tensor_inputs = self._dropping_source(
                call, edit, callback_on_step_end, callback_on_step_end_tensor_inputs
            )
        arguments = dict(
            prompt=prompts or None,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=_negative_list(negative_prompt, count),
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            return_dict=False,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
            **options,
        )
        self._call = call
        try:
            if count == 1:
                images, nsfw = super().__call__(**arguments)
            else:
                with editing(self, edit, images_per_prompt=num_images_per_prompt, backend=backend):
                    images, nsfw = super().__call__(**arguments)
        finally:
            self._call = None

        if not keep_source and not call.source_dropped:  # interrupted before the step at which it is dropped
            images, nsfw = images[num_images_per_prompt:], nsfw and nsfw[num_images_per_prompt:]
        if not return_dict:
            return images, nsfw
        return FreePromptPipelineOutput(
            images=images,
            nsfw_content_detected=nsfw,
            images_per_prompt=num_images_per_prompt,
            source_kept=keep_source,
        )

    def check_inputs(self, prompt: Any, height: int, width: int, *args: Any, **kwargs: Any) -> None:
        """The parent's checks, with the size measured against this autoencoder rather than against 8 pixels."""
        _check_size(height, width, self.vae_scale_factor)
        super().check_inputs(prompt, 8, 8, *args, **kwargs)

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

    def _image_size(self, height: int | None, width: int | None, latents: torch.Tensor | None) -> tuple[int, int]:
        """Height and width in pixels; the parent ignores one given without the other, and sizes against latents."""
        factor = self.vae_scale_factor
        sample = self.unet.config.sample_size
        grid = (sample, sample) if isinstance(sample, int) else tuple(sample)
        if latents is not None:
            grid = tuple(latents.shape[-2:])
        size = (
            grid[0] * factor if height is None else height,
            grid[1] * factor if width is None else width,
        )
        if latents is not None and (size[0] // factor, size[1] // factor) != grid:
            raise ValueError(
                f"latents of {grid[0]} x {grid[1]} make images of {grid[0] * factor} x {grid[1] * factor} pixels "
                f"(height x width), received height {height} and width {width}; leave height and width out, or pass "
                "latents of that size"
            )
        _check_size(*size, factor)
        return size

    def _check_source_can_be_dropped(self, prompts: int, options: dict[str, Any]) -> None:
        """Raise where keep_source=False would leave source rows behind that the parent gives no access to."""
        hint = "use keep_source=True"
        if prompts == 1:
            raise ValueError("keep_source=False needs at least one target prompt beside the source, received none")
        if options.get("ip_adapter_image") is not None or options.get("ip_adapter_image_embeds") is not None:
            raise ValueError(f"keep_source=False cannot drop the source's image embeddings of an IP-Adapter; {hint}")
        if self.unet.config.time_cond_proj_dim is not None:
            raise ValueError(f"keep_source=False cannot drop the source's guidance embedding of this UNet; {hint}")
        if hasattr(self.scheduler, "noise_sampler"):
            raise ValueError(
                f"keep_source=False would change the noise that {type(self.scheduler).__name__} adds, which it draws "
                f"for all rows at once; {hint} or a scheduler without a noise sampler"
            )

    def _dropping_source(
        self, call: _Call, edit: Edit, callback: Any, tensor_inputs: Sequence[str]
    ) -> tuple[Callable[..., dict], list[str]]:
        """The user's callback, and after it the dropping of the source rows at the last step that needs them."""
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            tensor_inputs = callback.tensor_inputs
        ours = self._callback_tensor_inputs

        def on_step_end(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            changed = dict(tensors)
            if callback is not None:
                changed |= callback(pipe, index, timestep, {name: tensors[name] for name in tensor_inputs})
            total = self.num_timesteps
            last = max((step for step in range(total) if edit.active(Step(step, total))), default=0)
            if index == last:
                self._drop_source(call, changed)
            return changed

        return on_step_end, list(dict.fromkeys([*tensor_inputs, *ours]))

    def _drop_source(self, call: _Call, tensors: dict[str, Any]) -> None:
        """Remove the source rows, in place, from the loop's tensors, the step noise and the scheduler's history."""
        rows, first = tensors["latents"].shape[0], call.images_per_prompt
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and tensor.shape[0] % rows == 0:  # unconditional rows, then conditional
                tensors[name] = torch.cat([half[first:] for half in tensor.split(rows)])
        for name, value in vars(self.scheduler).items():
            setattr(self.scheduler, name, _without_rows(value, rows, first))
        del call.generators[:first]
        call.source_dropped = True


def _without_rows(value: Any, rows: int, first: int) -> Any:
    """A scheduler's attribute without the first rows of what it remembers of each image: 4-D tensors of `rows`."""
    if isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[0] == rows:
        return value[first:]
    if isinstance(value, list) and any(isinstance(item, torch.Tensor) for item in value):
        return [_without_rows(item, rows, first) for item in value]
    return value


def _prompt_list(prompt: Any, target_prompt: Any, prompt_embeds: torch.Tensor | None) -> list[str]:
    """All prompts, the source's first; none where embeddings stand in for them."""
    if prompt_embeds is not None:
        if prompt is not None or target_prompt is not None:
            raise ValueError("pass prompts or prompt_embeds (the source's first), not both")
        return []
    if isinstance(prompt, str):
        prompts = [prompt]
    elif prompt is None:
        raise ValueError("expected a source prompt, or prompt_embeds; received neither")
    else:
        prompts = list(prompt)
        if target_prompt is not None and len(prompts) != 1:
            raise ValueError(
                f"expected one source prompt beside target_prompt, received a list of {len(prompts)}; pass "
                "prompt=source, target_prompt=[target, …] or prompt=[source, target, …]"
            )
    prompts += [target_prompt] if isinstance(target_prompt, str) else list(target_prompt or ())
    if not prompts:
        raise ValueError("expected a source prompt and any number of targets, received an empty list")
    for text in prompts:
        if not isinstance(text, str):
            raise TypeError(f"prompts must be text, received {type(text).__name__}: {text!r}")
    return prompts


def _negative_list(negative_prompt: Any, count: int) -> list[str] | None:
    if negative_prompt is None:
        return None
    negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
    if len(negatives) == 1:
        return negatives * count
    if len(negatives) != count:
        raise ValueError(
            f"expected one negative prompt, or one for each of the {count} prompts (the source's first), "
            f"received {len(negatives)}"
        )
    return negatives


def _chosen_edit(edit: Edit | None, self_replace_steps: Any, levels: Any, max_tokens: Any, layers: Any) -> Edit:
    given = {"levels": levels, "max_tokens": max_tokens, "layers": layers}
    if edit is None:
        return FreePromptEdit(self_replace_steps, **given)
    if self_replace_steps != 0.8 or any(value is not None for value in given.values()):
        raise ValueError("self_replace_steps, levels, max_tokens and layers belong to the edit; pass them to it")
    return edit


def _check_size(height: int, width: int, factor: int) -> None:
    for name, side in (("height", height), ("width", width)):
        if side <= 0 or side % factor:
            nearest = max(1, round(side / factor)) * factor
            raise ValueError(
                f"{name} must be a positive multiple of {factor} pixels, which one latent pixel stands for; "
                f"received {side}, the nearest is {nearest}"
            )


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if not hasattr(number, "__index__") or number < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, received {number!r}")
