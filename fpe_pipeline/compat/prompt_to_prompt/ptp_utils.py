"""Prompt-to-Prompt's ``ptp_utils``: registering a controller, the sampling loop, pictures side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ...callers import warn
from ...errors import EditWarning, check_generator, check_guidance, check_positive
from ..controlled import Compat, ControlledLayers, controlled_layers, register_controller
from ..given import check_count, listed, shown
from ..names import unknown_name
from ..switch import chosen_compat
from .seq_aligner import get_word_inds
from .word_tokens import get_time_words_attention_alpha, update_alpha_time_word

__all__ = [
    "diffusion_step",
    "get_time_words_attention_alpha",
    "get_word_inds",
    "init_latent",
    "latent2image",
    "register_attention_control",
    "text2image_ldm_stable",
    "text_under_image",
    "update_alpha_time_word",
    "view_images",
]

__getattr__ = unknown_name(
    __name__,
    "Prompt-to-Prompt's ptp_utils",
    __all__,
    {"text2image_ldm": "current diffusers has no pipeline of that model with attention processors"},
)


def register_attention_control(
    model: Any, controller: Any, compat: Compat = None, backend: str = "auto"
) -> ControlledLayers | None:
    """Let a controller see and edit every attention map of a pipeline's UNet from here on.

    Args:
        model: a diffusers pipeline with a UNet.
        controller: an ``AttentionControl``, ``EmptyControl`` or anything called ``controller(attn, is_cross, place)``;
            None takes off what is registered.
        compat: ``"original"`` takes the second half of every batch for the conditional one, guidance or not.
        backend: of ``fpe_kernels``.

    Returns:
        What puts the layers back as they were, by ``restore()`` or as a ``with`` block; None for no controller.

    Raises:
        ValueError: a UNet in an editing session, or layers that do more than attention.
    """
    if controller is not None:
        return register_controller(model, controller, compat, backend)
    registered = controlled_layers(model)
    if registered is not None:
        registered.restore()
    return None


def diffusion_step(
    model: Any,
    controller: Any,
    latents: torch.Tensor,
    context: Any,
    t: Any,
    guidance_scale: float,
    low_resource: bool = False,
) -> torch.Tensor:
    """One guided step: the latents [B, C, h, w] after it, as the controller's ``step_callback`` leaves them.

    Args:
        model: the pipeline.
        controller: the one that is registered, or None.
        latents: [B, C, h, w].
        context: embeddings [2 B, M, C], unconditional rows first; or the pair of halves.
        t: the scheduler's timestep.
        guidance_scale: of classifier-free guidance.
        low_resource: call the UNet for each half alone; the controller sees the conditional one.
    """
    if not isinstance(context, torch.Tensor):
        context = torch.cat(tuple(context))
    given = model.scheduler.scale_model_input(latents, t)
    registered = controlled_layers(model)
    if low_resource:
        unconditional, conditional = context.chunk(2)
        with nullcontext() if registered is None else registered.paused():
            away = model.unet(given, t, encoder_hidden_states=unconditional).sample
        with nullcontext() if registered is None else registered.guided_as(False):
            towards = model.unet(given, t, encoder_hidden_states=conditional).sample
    else:
        with nullcontext() if registered is None else registered.guided_as(True):
            away, towards = model.unet(torch.cat([given] * 2), t, encoder_hidden_states=context).sample.chunk(2)
    latents = model.scheduler.step(away + guidance_scale * (towards - away), t, latents).prev_sample
    return latents if controller is None else controller.step_callback(latents)


@torch.no_grad()
def text2image_ldm_stable(
    model: Any,
    prompt: str | Sequence[str],
    controller: Any,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    generator: torch.Generator | None = None,
    latent: torch.Tensor | None = None,
    low_resource: bool = False,
    *,
    uncond_embeddings: Sequence[torch.Tensor] | None = None,
    start_time: int | None = None,
    return_type: str = "image",
    compat: Compat = None,
) -> tuple[Any, torch.Tensor]:
    """Images of several prompts from one noise, with a controller; afterwards the layers are as they were.

    Args:
        model: a Stable Diffusion pipeline.
        prompt: the source prompt and its targets; or one alone.
        controller: registered for the run; None for none.
        num_inference_steps, guidance_scale: of the run.
        generator: of the noise, where no latent is passed.
        latent: the noise [1, C, h, w] or [B, C, h, w]; default: of the model's own size.
        low_resource: as of :func:`diffusion_step`.
        uncond_embeddings: for each step, the unconditional embedding [1, M, C] (null-text inversion).
        start_time: of the steps, how many of the last ones are run; default, and where there are no more: all.
        return_type: "image" for arrays [B, H, W, 3], uint8, else for latents.
        compat: ``"original"`` runs a controller on from where another run left it, and leaves it registered; with
            ``start_time`` it takes the first of the embeddings for the first step that is run.

    Returns:
        Images or latents, and the noise that they came from [1, C, h, w].

    Raises:
        TypeError: prompts that are no texts, a seed or several generators, a noise that is no tensor.
        ValueError: a pipeline of several text encoders, steps or guidance that are no numbers, a noise of other rows or
            channels, embeddings of another number of steps.
    """
    compat = chosen_compat(compat)
    if getattr(model, "text_encoder_2", None) is not None or getattr(model, "text_encoder", None) is None:
        raise ValueError(
            f"{type(model).__name__} is not conditioned on one text encoder's embeddings alone: register the "
            "controller with register_attention_control(model, controller) and call the pipeline itself"
        )
    prompt = listed(prompt)
    check_positive(num_inference_steps=num_inference_steps)
    check_guidance(guidance_scale)
    if start_time is not None:
        check_positive(start_time=start_time)
    towards, away = model.encode_prompt(prompt, model._execution_device, 1, True)
    latent, latents = init_latent(latent, model, None, None, generator, len(prompt))
    model.scheduler.set_timesteps(num_inference_steps)
    timesteps = model.scheduler.timesteps
    first = 0 if start_time is None else max(0, len(timesteps) - start_time)
    if uncond_embeddings is not None:
        check_count("uncond_embeddings", uncond_embeddings, len(timesteps), "embeddings", "null-text inversion")
        uncond_embeddings = uncond_embeddings[first if compat is None else 0 :]
    if compat is None:
        warn_of_prompts(controller, prompt)
    registered = register_attention_control(model, controller, compat)
    if compat is None and hasattr(controller, "reset"):
        controller.reset()
    if controller is not None and getattr(controller, "prompts", None) is getattr(controller, "prompts_of_run", None):
        controller.prompts = controller.prompts_of_run = prompt  # unless it has prompts of its own
    try:
        for index, t in enumerate(timesteps[first:]):
            if uncond_embeddings is not None:
                away = uncond_embeddings[index].to(towards).expand_as(towards)  # optimised in float32
            context = torch.cat([away, towards])
            latents = diffusion_step(model, controller, latents, context, t, guidance_scale, low_resource)
    finally:
        if registered is not None and compat is None:
            registered.restore()
    return (latent2image(model.vae, latents) if return_type == "image" else latents), latent


def warn_of_prompts(controller: Any, prompts: Sequence[str]) -> None:
    """Say so where an edit's words are those of other prompts than the run's; other numbers of prompts are refused."""
    made_for = getattr(controller, "prompts", None)
    if hasattr(controller, "cross_replace_steps") and made_for is not None and list(made_for) != list(prompts):
        warn(
            f"the controller is made for {list(made_for)}, whose words it aligns, and the run has {list(prompts)}: "
            "make a controller with the prompts of the call",
            EditWarning,
        )


def init_latent(
    latent: torch.Tensor | None,
    model: Any,
    height: int | None,
    width: int | None,
    generator: torch.Generator | None,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One noise [1, C, h, w], drawn where none is passed, and the same for each of the batch [B, C, h, w].

    Raises:
        TypeError: a noise that is no tensor, a seed or several generators.
        ValueError: a noise of other rows or channels.
    """
    channels, size = model.unet.config.in_channels, model.unet.config.sample_size
    check_generator(generator)
    if isinstance(generator, list | tuple):
        raise TypeError(f"expected one generator, of the noise of all prompts, got a {type(generator).__name__}")
    if latent is not None and not isinstance(latent, torch.Tensor):
        raise TypeError(f"expected latent to be a tensor [1, {channels}, h, w], got {type(latent).__name__}")
    if latent is not None and (
        latent.ndim != 4 or latent.shape[0] not in (1, batch_size) or latent.shape[1] != channels
    ):
        raise ValueError(
            f"expected a latent [1, {channels}, h, w], or one for each of {batch_size} prompts, got "
            f"{list(latent.shape)}"
        )
    if latent is None:
        sides = [size if side is None else side // model.vae_scale_factor for side in (height, width)]
        latent = torch.randn((1, channels, *sides), generator=generator, dtype=torch.float32)
        latent = latent * model.scheduler.init_noise_sigma
    latents = latent.expand(batch_size, -1, -1, -1).to(model._execution_device, model.unet.dtype)
    return latent, latents


@torch.no_grad()
def latent2image(vae: Any, latents: torch.Tensor) -> np.ndarray:
    """Decoded images [B, H, W, 3], uint8."""
    decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    pixels = (decoded.float() / 2 + 0.5).clamp(0, 1) * 255
    return pixels.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)


def text_under_image(image: np.ndarray, text: str, text_color: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """The image [H, W, 3], uint8, above a white band of a fifth of its height with the text in the middle."""
    height, width = image.shape[:2]
    band = Image.new("RGB", (width, int(height * 0.2)), "white")
    draw, font = ImageDraw.Draw(band), ImageFont.load_default(max(8, band.height // 3))
    draw.text((width / 2, band.height / 2), text, fill=text_color, font=font, anchor="mm")
    return np.concatenate([image[..., :3], np.asarray(band)])


def _pictures(given: Any) -> list[np.ndarray]:
    """Each [H, W, 3], uint8."""
    if isinstance(given, Image.Image):
        given = [given]
    elif isinstance(given, np.ndarray | torch.Tensor):
        given = list(given) if given.ndim == 4 else [given]
    elif isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"expected pictures: PIL images, arrays or tensors, got {given!r}")
    pictures = [shown(image) for image in given]
    if len({picture.shape for picture in pictures}) != 1:
        sizes = [picture.shape[:2] for picture in pictures]
        raise ValueError(f"expected one or more pictures of one height and width, got {sizes}")
    return pictures


def view_images(images: Any, num_rows: int = 1, offset_ratio: float = 0.02) -> Image.Image:
    """Pictures of one size in rows, shown where a notebook runs.

    Args:
        images: a PIL image, an array [H, W, 3] or [H, W], uint8 or floats in [0, 1], or a tensor [3, H, W]; a list of
            them, or an array [B, H, W, 3].
        num_rows: rows of the picture.
        offset_ratio: the gap between them, as a share of their height.

    Raises:
        ValueError: no pictures, pictures of several sizes or of other shapes or values, rows that are no number.
        TypeError: what is no picture.
    """
    check_positive(num_rows=num_rows)
    images = _pictures(images)
    columns = -(-len(images) // num_rows)
    height, width = images[0].shape[:2]
    gap = int(height * offset_ratio)
    size = (columns * (width + gap) - gap, num_rows * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        sheet.paste(Image.fromarray(image), (column * (width + gap), row * (height + gap)))
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import display
    except ImportError:
        return sheet
    if get_ipython() is not None:
        display(sheet)  # type: ignore[no-untyped-call, unused-ignore]
    return sheet
