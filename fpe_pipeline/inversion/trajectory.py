"""Inversion: the noise, and every latent on the way to it, from which a real image comes out again.

Four methods, on the same DDIM trajectory; they differ in what holds the source to it while it is denoised again:

- ``"ddim"``: between steps the source row is put back onto the stored latent, the reference latents of
  Free-Prompt-Editing. What comes out after the last step is the sampler's own last step.
- ``"direct"``: as above, and after the last step too. Direct Inversion adds to the source branch, step by step, its
  difference from the inversion latent, which is to overwrite it with that latent; the source then comes out as the
  autoencoder's reconstruction, whatever prompt and guidance. Nothing is optimised.
- ``"null-text"``: the source is free, and the unconditional embedding of each step is optimised such that guided
  denoising follows the trajectory; see :mod:`fpe_pipeline.inversion.null_text`.
- ``"negative-prompt"``: the source is free, and its own prompt stands in for the unconditional one. Then guidance
  cancels in the source row, which goes back as it came; it costs nothing and follows less exactly.

Sources: Song et al., "Denoising Diffusion Implicit Models", ICLR 2021; Ju et al., "PnP Inversion: Boosting
Diffusion-based Editing with 3 Lines of Code", ICLR 2024; Mokady et al., "Null-text Inversion for Editing Real Images
using Guided Diffusion Models", CVPR 2023; Miyake et al., "Negative-prompt Inversion", 2023.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from ..atomic_folder import replaced, save_tensors
from ..errors import InputError, check_guidance, check_positive, warn_of_size
from ..images.load import load_image, to_tensor
from ..models.adapters.adapter import identity
from ..models.steps import Step
from ..prompts.words import warn_of_unknown_words
from ..sampling.decoding import scaled_latents
from ..sampling.noise_schedule import NoiseSchedule, ddim_inverse_step, require_ddim
from ..sampling.pipeline import SamplingPipeline
from ..sampling.served_models import check_guided_inversion, check_pipeline, check_without_image_prompts
from ..sampling.unet_conditions import UNetConditions
from ..session.finite import is_finite, refuse_step
from ..session.unedited import unedited
from ..texts import check_text
from .null_text import NullText, optimise_unconditional

__all__ = ["METHODS", "Inversion", "Method", "encode_image", "invert"]

Method = Literal["ddim", "direct", "null-text", "negative-prompt"]
METHODS: tuple[Method, ...] = get_args(Method)


FORMAT = 1
NULL_TEXT_SETTINGS = ("guidance_scale", "inner_steps", "early_stop", "gradient_checkpointing")


@dataclass(frozen=True, eq=False, repr=False)
class Inversion:
    """A real image as a trajectory of latents, for ``pipe(..., inversion=inversion)``.

    Args:
        method: how the source is held to the trajectory; see this module, and of flow models
            :mod:`fpe_pipeline.inversion.flow`.
        latents: [steps + 1, 1, C, h, w] from the encoded image (first) to noise (last); of FLUX.1 packed, as
            [steps + 1, 1, tokens, 4 · C].
        prompt: of the image; empty where none was given.
        guidance_scale: of the passes from image to noise.
        schedule: the run that the latents belong to.
        image: the picture as it was encoded, cut to size.
        null_text: settings of the optimisation, with the guidance that it is for.
        unconditional: [steps, 1, tokens, channels], the optimised embedding of each step, noisiest first.
        text_length: of flow models, the tokens of T5 that the prompt was encoded in (``max_sequence_length``).
    """

    method: Method | Literal["reference", "free"]
    latents: torch.Tensor
    prompt: str
    guidance_scale: float
    schedule: NoiseSchedule
    image: Image.Image
    null_text: NullText | None = None
    unconditional: torch.Tensor | None = None
    text_length: int | None = None

    def __repr__(self) -> str:
        latents = f"{list(self.latents.shape)} {str(self.latents.dtype).removeprefix('torch.')}"
        size = f"{self.image.width}x{self.image.height}"
        return (
            f"{type(self).__name__}({self.method!r}, {_shortened(self.prompt)!r}, {self.steps} steps, "
            f"guidance {self.guidance_scale:g}, image {size}, latents {latents} on {self.latents.device})"
        )

    def save(self, path: str | Path) -> Path:
        """Write everything into one safetensors file, which :meth:`load` reads; a file of that name is replaced.

        Of null-text settings all but ``on_step`` is kept.
        """
        tensors = {"latents": self.latents, "image": torch.from_numpy(np.array(self.image.convert("RGB")))}
        if self.unconditional is not None:
            tensors["unconditional"] = self.unconditional
        null_text = None
        if self.null_text is not None:
            null_text = {name: getattr(self.null_text, name) for name in NULL_TEXT_SETTINGS}
        values = {
            "format": FORMAT,
            "method": self.method,
            "prompt": self.prompt,
            "guidance_scale": self.guidance_scale,
            "schedule": asdict(self.schedule),
            "null_text": null_text,
            "text_length": self.text_length,
        }
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with replaced(path) as partial:
            save_tensors(partial, contiguous, {"fpe_inversion": json.dumps(values)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Inversion:
        """An inversion from the file that :meth:`save` wrote.

        Args:
            path: of the file.
            device: of the tensors. Edits take them from wherever they are.

        Raises:
            InputError: no such file, or not an inversion of this version.
        """
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                values = json.loads((file.metadata() or {}).get("fpe_inversion", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except OSError as error:
            raise InputError(
                f"cannot read '{path}': {error.strerror or error}; pass what Inversion.save wrote"
            ) from error
        except SafetensorError as error:
            raise InputError(
                f"'{path}' is no inversion, or damaged: {error}; pass what Inversion.save wrote"
            ) from error
        if values.get("format") != FORMAT:
            raise InputError(
                f"expected an inversion of format {FORMAT}, '{path}' has {values.get('format')}; invert the image again"
            )
        schedule = values["schedule"]
        schedule |= {name: tuple(schedule[name]) for name in ("timesteps", "levels")}
        return cls(
            method=values["method"],
            latents=tensors["latents"],
            prompt=values["prompt"],
            guidance_scale=values["guidance_scale"],
            schedule=NoiseSchedule(**schedule),
            image=Image.fromarray(tensors["image"].cpu().numpy()),
            null_text=None if values["null_text"] is None else NullText(**values["null_text"]),
            unconditional=tensors.get("unconditional"),
            text_length=values.get("text_length"),
        )

    @property
    def noise(self) -> torch.Tensor:
        """Latents [1, C, h, w] to start from."""
        return self.latents[-1]

    @property
    def steps(self) -> int:
        """Denoising steps of the run."""
        return len(self.latents) - 1

    def reference(self, step: int) -> torch.Tensor | None:
        """The latent [1, C, h, w] that the source row is put onto after step ``step``; None leaves it free."""
        last = step + 1 >= self.steps
        if self.method == "direct" or (self.method in ("ddim", "reference") and not last):
            return self.latents[self.steps - 1 - step]
        return None

    def check(self, scheduler: Any, guidance_scale: float) -> None:
        """Set a UNet's ``scheduler`` to this run; raise ValueError where one at ``guidance_scale`` cannot follow it."""
        require_ddim(scheduler, f"an image inverted by {self.method!r}")
        scheduler.set_timesteps(self.steps)
        self.schedule.check(scheduler, "inversion")
        if self.null_text is not None and guidance_scale != self.null_text.guidance_scale:
            raise ValueError(
                f"the unconditional embeddings were optimised for guidance_scale={self.null_text.guidance_scale:g}, "
                f"got {guidance_scale:g}; pass that one, or invert with another NullText(guidance_scale=…)"
            )
        if self.method == "negative-prompt" and guidance_scale <= 1:
            raise ValueError(
                f"negative-prompt inversion lives in the unconditional half, which guidance_scale={guidance_scale:g} "
                "switches off; pass a larger one, or invert by 'ddim' or 'direct'"
            )


@torch.inference_mode(False)  # the optimisation takes gradients, for which latents made in that mode are no good
def invert(
    pipe: SamplingPipeline,
    image: Any,
    prompt: str = "",
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    method: Method | NullText = "ddim",
    height: int | None = None,
    width: int | None = None,
    callback: Callable[[int, int, torch.Tensor], None] | None = None,
) -> Inversion:
    """Find the noise from which a real image comes out again, to edit it with ``pipe(inversion=…)``.

    Inside a session or `heat_maps`, its passes are neither edited nor watched.

    Args:
        image: a path, a PIL image, an array or a tensor; `fpe_pipeline.images.load` states how it is cut and scaled.
        prompt: what the image shows. "negative-prompt" and "null-text" live by it; the others do without.
        num_inference_steps: steps here and of the edits.
        guidance_scale: of these passes, not of the edits; 1 follows the image best.
        method: "ddim", "direct", "null-text" (or a `NullText` with its settings) or "negative-prompt"; see
            `fpe_pipeline.inversion.trajectory`.
        height, width: pixels, multiples of the autoencoder's factor; default: the image's aspect ratio at the
            model's own number of pixels.
        callback: called after each step with its index, the number of steps and the latents.

    Returns:
        `Inversion`, for any number of edits.

    Raises:
        InputError: an image that cannot be read or used.
        ValueError: a model that `FreePromptPipeline` does not serve, an IP-Adapter, a scheduler whose steps cannot be
            undone, an unknown method, numbers out of range.
    """
    check_pipeline(pipe)
    check_without_image_prompts(pipe, "inversion")
    name, null_text = _chosen_method(pipe, method, guidance_scale)
    if not isinstance(prompt, str):
        raise TypeError(f"expected one prompt, the image's, got {type(prompt).__name__}")
    check_text("the prompt", prompt)
    check_positive(num_inference_steps=num_inference_steps)
    check_guidance(guidance_scale)
    require_ddim(pipe.scheduler, "inversion")

    picture = load_image(
        image, (width, height), multiple=pipe.pixel_multiple, pixels=pipe.native_size[0] * pipe.native_size[1]
    )
    warn_of_size(picture.size[::-1], pipe.native_size)
    warn_of_unknown_words([prompt], pipe.tokenizer)
    pipe.scheduler.set_timesteps(int(num_inference_steps), device=pipe._execution_device)
    schedule = NoiseSchedule.of(pipe.scheduler)
    with unedited(pipe):
        with torch.no_grad():
            guided = guidance_scale > 1
            conditions = pipe.conditions(prompt, guided or null_text is not None, picture.size[::-1])
            told = conditions if guided or null_text is None else conditions.halves()[1]
            latents = _to_noise(pipe, encode_image(pipe, picture), told, guidance_scale, callback)
        embeddings = None if null_text is None else optimise_unconditional(pipe, latents, conditions, null_text)
    pipe.maybe_free_model_hooks()
    return Inversion(name, latents, prompt, guidance_scale, schedule, picture, null_text, embeddings)


def _chosen_method(
    pipe: SamplingPipeline, method: Method | NullText, guidance_scale: float
) -> tuple[Method, NullText | None]:
    """The method by its name, and null-text's settings; ValueError where the model or guidance does not suit it."""
    null_text = method if isinstance(method, NullText) else NullText() if method == "null-text" else None
    name: Method = "null-text" if null_text is not None else cast(Method, method)
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)} or a NullText, got {method!r}")
    check_guided_inversion(pipe, name)
    if null_text is not None:
        null_text.check(pipe)
        if guidance_scale > 1:
            raise ValueError(
                f"null-text optimisation follows the unguided trajectory, got guidance_scale={guidance_scale:g}: "
                "leave it out, and give the edit's own to NullText(guidance_scale=…)"
            )
    return name, null_text


def _to_noise(
    pipe: SamplingPipeline,
    encoded: torch.Tensor,
    conditions: UNetConditions,
    guidance_scale: float,
    callback: Callable[[int, int, torch.Tensor], None] | None,
) -> torch.Tensor:
    """Latents [steps + 1, 1, C, h, w] of the scheduler's run, from the encoded image [1, C, h, w] to noise."""
    latents, timesteps = [encoded], pipe.scheduler.timesteps
    with pipe.progress_bar(total=len(timesteps)) as bar:
        for index, timestep in enumerate(reversed(timesteps)):
            sample = latents[-1]
            prediction = _guided(conditions.predict(pipe.denoiser, sample, timestep), guidance_scale)
            latents.append(ddim_inverse_step(pipe.scheduler, prediction, int(timestep), sample))
            if not is_finite(latents[-1]):
                given = conditions.call(sample, timestep)
                refuse_step(Step(index, len(timesteps)), identity(pipe.denoiser), *given)
            bar.update()
            if callback is not None:
                callback(index, len(timesteps), latents[-1])
    return torch.stack(latents)


def encode_image(pipe: SamplingPipeline, image: Image.Image) -> torch.Tensor:
    """The mean of the autoencoder's distribution for an RGB image, scaled as the UNet takes it: [1, C, h, w]."""
    with pipe.computing_autoencoder() as vae:
        pixels = to_tensor(image).to(pipe._execution_device, vae.dtype)
        mean = vae.encode(pixels).latent_dist.mean
    return scaled_latents(pipe.vae, mean).to(pipe.denoiser.dtype)


def _guided(predicted: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """A prediction [1, C, h, w], guided where an unconditional row stands before the conditional one."""
    if predicted.shape[0] == 1:
        return predicted
    unconditional, conditional = predicted.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def _shortened(text: str, longest: int = 40) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
