"""What `record` is asked for, and the run that follows from it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..edits import Edit
from ..edits.base import check_prompts
from ..errors import check_generator, check_guidance, check_positive
from ..inversion.follow import check_inversion_options
from ..inversion.trajectory import Inversion
from ..sampling.arguments import chosen_edit, image_size
from ..sampling.pipeline import SamplingPipeline
from ..sampling.served_models import check_guided_inversion, check_options, check_pipeline, check_without_image_prompts
from ..session.finite import check_latents
from ..session.shared_noise import shared_latents
from ..texts import check_text
from .precision import PRECISIONS, Precision
from .requirements import check_deterministic

__all__ = ["RecordOptions", "RecordRequest", "Source"]


class RecordOptions(TypedDict, total=False):
    """The options of `record` beside the prompt, for type checkers; `RecordRequest` has their defaults."""

    self_replace_steps: Any
    levels: int | Iterable[int] | None
    max_tokens: int | None
    layers: str | int | Iterable[str | int] | None
    edit: Edit | Sequence[Edit] | None
    placement: str | Path
    precision: Precision
    budget_bytes: int | None
    inversion: Inversion | None
    latents: torch.Tensor | None
    generator: torch.Generator | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    negative_prompt: str | None
    backend: str


@dataclass(frozen=True)
class Source:
    """The run that is recorded."""

    prompt: str
    negative_prompt: str | None
    guidance_scale: float
    steps: int
    inversion: Inversion | None


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordRequest:
    """What `record` was passed, which says what each field is."""

    prompt: str | None = None
    self_replace_steps: Any = 0.8
    levels: int | Iterable[int] | None = None
    max_tokens: int | None = None
    layers: str | int | Iterable[str | int] | None = None
    edit: Edit | Sequence[Edit] | None = None
    placement: str | Path = "device"
    precision: Precision = "exact"
    budget_bytes: int | None = None
    inversion: Inversion | None = None
    latents: torch.Tensor | None = None
    generator: torch.Generator | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    backend: str = "auto"

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of the options."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.name != "prompt")

    @classmethod
    def signature_of(cls, function: Callable[..., Any]) -> inspect.Signature:
        """The signature of a function, with the options in place of its ``**options``."""
        written = inspect.signature(function)
        kept = [one for one in written.parameters.values() if one.kind is not one.VAR_KEYWORD]
        fields = {field.name: field for field in dataclasses.fields(cls)}
        kept += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for name in cls.names()
            for field in [fields[name]]
        ]
        return written.replace(parameters=kept)

    def source(self, pipe: SamplingPipeline) -> Source:
        """The run that is to be recorded; the pipeline's scheduler is set to an inversion's.

        Raises:
            TypeError, ValueError: what cannot be recorded, see `record`.
        """
        check_pipeline(pipe)
        check_without_image_prompts(pipe, "a recording")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        check_placement(self.placement)
        check_deterministic(pipe.scheduler)
        scale = pipe.parent_default("guidance_scale") if self.guidance_scale is None else self.guidance_scale
        check_guidance(scale)
        check_generator(self.generator)
        prompt, steps, inversion = self.prompt, self.num_inference_steps, self.inversion
        if inversion is not None:
            check_inversion_options(inversion, {"latents": self.latents}, self.negative_prompt, steps)
            check_guided_inversion(pipe, inversion.method)
            inversion.check(pipe.scheduler, scale)
            prompt = inversion.prompt if prompt is None else prompt
            steps = inversion.steps
        prompt = _checked_prompts(prompt, self.negative_prompt)
        steps = 50 if steps is None else steps
        check_positive(num_inference_steps=steps)
        check_options(pipe, scale, self.negative_prompt is not None and inversion is None, {})
        return Source(prompt, self.negative_prompt, scale, steps, inversion)

    def edits(self, pipe: SamplingPipeline, source: Source) -> list[Edit]:
        """The edits to record for, which may be about this source."""
        given = self.edit if isinstance(self.edit, Sequence) else (self.edit,)
        if not given:
            raise ValueError("expected an edit to record for, or several, got none: leave edit out for its default")
        steps, unet = self.self_replace_steps, pipe.denoiser
        edits = [chosen_edit(one, steps, self.levels, self.max_tokens, self.layers, unet) for one in given]
        for one in edits:
            check_prompts(one, [source.prompt], pipe.tokenizer)
        return edits

    def noise(self, pipe: SamplingPipeline, source: Source) -> torch.Tensor:
        """The latents [1, C, h, w] to start from, given or of the size that was asked for, on the run's device."""
        device, dtype, factor = pipe._execution_device, pipe.denoiser.dtype, pipe.vae_scale_factor
        latents = self.latents if source.inversion is None else source.inversion.noise
        check_latents(latents)
        size = image_size(pipe.native_size, factor, self.height, self.width, latents, pipe.pixel_multiple)
        if latents is None:
            shape = (1, pipe.denoiser.config.in_channels, *(side // factor for side in size))
            latents = randn_tensor(shape, generator=self.generator, device=device, dtype=dtype)
        if latents.ndim != 4 or latents.shape[0] != 1:
            raise ValueError(f"a recording holds one image: expected latents [1, C, h, w], got {list(latents.shape)}")
        shared_latents(latents, 1, 1, pipe.denoiser.config.in_channels)  # refuses another number of channels
        return latents.to(device, dtype)


def _checked_prompts(prompt: Any, negative_prompt: Any) -> str:
    """The source's prompt; TypeError or ValueError for one of the two that is no text."""
    for name, text in (("source", prompt), ("negative", negative_prompt)):
        if not isinstance(text, str) and (name, text) != ("negative", None):
            raise TypeError(f"expected one {name} prompt, got {type(text).__name__}")
        check_text(f"the {name} prompt", text or "")
    return prompt


def check_placement(placement: str | Path) -> None:
    """Raise for the name of a device or of a medium, which would become a folder of that name."""
    if not isinstance(placement, str | Path):
        raise TypeError(f'placement must be "device", "cpu" or a folder, got {type(placement).__name__}')
    if placement in ("device", "cpu") or isinstance(placement, Path):
        return
    try:
        torch.device(placement)
    except RuntimeError:
        is_a_folder = placement not in ("gpu", "disk", "memory")
    else:
        is_a_folder = False
    if not is_a_folder:
        raise ValueError(
            f'placement must be "device" (that of the pipeline), "cpu" or a folder, got {placement!r}; if a '
            f"folder is meant, pass Path({placement!r})"
        )
