"""PnPInversion (Ju et al., ICLR 2024): Direct Inversion and Prompt-to-Prompt on it, as its repository has them.

``from models.p2p.inversion import DirectInversion`` and its like become ``from fpe_pipeline.compat.pnp_inversion import
DirectInversion``. See ``docs/compat/pnp-inversion.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import check_guidance, check_positive
from ..sampling.noise_schedule import ddim_inverse_step, require_ddim
from .controlled import Compat
from .given import listed, pixels
from .names import unknown_name
from .prompt_to_prompt import edits
from .prompt_to_prompt.edits import AttentionControlEdit
from .prompt_to_prompt.ptp_utils import (
    diffusion_step,
    init_latent,
    latent2image,
    register_attention_control,
    warn_of_prompts,
)
from .switch import chosen_compat

__all__ = [
    "DirectInversion",
    "direct_inversion_p2p_guidance_diffusion_step",
    "direct_inversion_p2p_guidance_forward",
    "make_controller",
    "register_attention_control",
]

__getattr__ = unknown_name(__name__, "PnPInversion", __all__)

#: By PnPInversion: self-attention maps of more query tokens keep their own.
SELF_TOKENS = 32**2


class DirectInversion:
    """DDIM inversion, and for each step what guided denoising has to be moved by to stay on it.

    Args:
        model: a Stable Diffusion pipeline with a DDIM scheduler.
        num_ddim_steps: of the runs.
    """

    def __init__(self, model: Any, num_ddim_steps: int) -> None:
        check_positive(num_ddim_steps=num_ddim_steps)
        self.model, self.num_ddim_steps = model, num_ddim_steps
        self.tokenizer = model.tokenizer
        self.prompt: list[str] | None = None
        self.context: torch.Tensor | None = None

    @property
    def scheduler(self) -> Any:
        """The pipeline's."""
        return self.model.scheduler

    @torch.no_grad()
    def invert(
        self, image_gt: Any, prompt: Sequence[str], guidance_scale: float
    ) -> tuple[Any, np.ndarray, list[torch.Tensor], list[torch.Tensor]]:
        """Invert an image; a registered controller is taken off.

        Args:
            image_gt: an array [H, W] or [H, W, C], uint8 or floats in [0, 1], or a PIL image; a tensor [1, 3, H, W] in
                [-1, 1]; or latents [1, C, h, w].
            prompt: the image's, and those of the targets to come.
            guidance_scale: of the edits to come.

        Returns:
            The image as it was passed; what the autoencoder makes of it [H, W, 3], uint8; the latents [1, C, h, w] from
            the image (first) to the noise (last); and for each step the offsets [prompts, C, h, w], noisiest first.

        Raises:
            ValueError: another scheduler than DDIM, an array or a tensor of other shapes or values, guidance that is no
                number.
            TypeError: prompts that are no list, or no picture.
        """
        if isinstance(prompt, str):
            raise TypeError(f"expected a list of prompts, the image's first, got the text {prompt!r}")
        require_ddim(self.scheduler, "direct inversion")
        check_guidance(guidance_scale)
        register_attention_control(self.model, None)
        device = self.model._execution_device  # of offloaded models, where they compute
        self.prompt = listed(prompt)
        conditional, unconditional = self.model.encode_prompt(self.prompt, device, 1, True)
        self.context = torch.cat([unconditional, conditional])
        self.scheduler.set_timesteps(self.num_ddim_steps)
        latents = [self._encoded(image_gt)]
        for t in reversed(self.scheduler.timesteps):
            noise = self.model.unet(latents[-1], t, encoder_hidden_states=conditional[:1]).sample
            latents.append(ddim_inverse_step(self.scheduler, noise, int(t), latents[-1]))
        return image_gt, latent2image(self.model.vae, latents[0])[0], latents, self._offsets(latents, guidance_scale)

    def _offsets(self, latents: Sequence[torch.Tensor], guidance_scale: float) -> list[torch.Tensor]:
        """For each step, from where a guided step leads to where the inversion was."""
        assert self.prompt is not None and self.context is not None
        current = latents[-1].expand(len(self.prompt), -1, -1, -1)
        offsets = []
        for index, t in enumerate(self.scheduler.timesteps):
            before = latents[-2 - index].expand_as(current)
            reached = diffusion_step(self.model, None, current, self.context, t, guidance_scale)
            offsets.append(before - reached)
            current = reached + offsets[-1]
        return offsets

    def _encoded(self, image: Any) -> torch.Tensor:
        vae, unet = self.model.vae, self.model.unet
        if isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[1] == unet.config.in_channels:
            return image.to(self.model._execution_device, unet.dtype)
        image = pixels(image)
        if image.shape[0] != 1:
            raise ValueError(f"expected one image [1, 3, H, W] to invert, got a tensor {tuple(image.shape)}")
        encoded = (
            vae.encode(image.to(self.model._execution_device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor
        )
        return encoded.to(unet.dtype)


def make_controller(
    pipeline: Any,
    prompts: Sequence[str],
    is_replace_controller: bool,
    cross_replace_steps: Any,
    self_replace_steps: Any,
    blend_words: Sequence[str | Sequence[str]] | None = None,
    equilizer_params: dict[str, Any] | None = None,
    num_ddim_steps: int = 50,
    *,
    compat: Compat = None,
) -> AttentionControlEdit:
    """A controller of Prompt-to-Prompt with PnPInversion's settings: self-attention up to 32² tokens, factors word by
    word.

    Args:
        pipeline: whose tokenizer finds the words.
        num_ddim_steps: of the run.
        prompts, is_replace_controller, cross_replace_steps, self_replace_steps, blend_words, equilizer_params: as of
            :func:`.prompt_to_prompt.make_controller`.
        compat: ``"original"`` for the alignments of the authors' code.
    """
    return edits.make_controller(
        prompts,
        is_replace_controller,
        cross_replace_steps,
        self_replace_steps,
        blend_words,
        equilizer_params,
        num_steps=num_ddim_steps,
        tokenizer=pipeline.tokenizer,
        self_tokens=SELF_TOKENS,
        compat=compat,
    )


def direct_inversion_p2p_guidance_diffusion_step(
    model: Any,
    controller: Any,
    latents: torch.Tensor,
    context: Any,
    t: Any,
    guidance_scale: float,
    noise_loss: torch.Tensor,
    low_resource: bool = False,
    add_offset: bool = True,
) -> torch.Tensor:
    """One guided step [B, C, h, w]; row 0 is then moved by its offset, before the controller's ``step_callback``.

    Args:
        noise_loss: the step's offsets [B, C, h, w], of which row 0's is added.
        add_offset: whether it is.
        model, controller, latents, context, t, guidance_scale, low_resource: as of :func:`.ptp_utils.diffusion_step`.
    """
    latents = diffusion_step(model, None, latents, context, t, guidance_scale, low_resource)
    if add_offset:
        latents = torch.cat([latents[:1] + noise_loss[:1].to(latents), latents[1:]])
    return latents if controller is None else controller.step_callback(latents)


@torch.no_grad()
def direct_inversion_p2p_guidance_forward(
    model: Any,
    prompt: Sequence[str],
    controller: Any,
    latent: torch.Tensor | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    generator: torch.Generator | None = None,
    noise_loss_list: Sequence[torch.Tensor] | None = None,
    add_offset: bool = True,
    *,
    compat: Compat = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the image's prompt and its targets, the image held to its inversion; the layers are restored after it.

    Args:
        model: a Stable Diffusion pipeline.
        prompt: the image's prompt and the targets.
        controller: registered for the run.
        latent: the inversion's last.
        num_inference_steps, guidance_scale: as those of the inversion.
        generator: of the noise, where no latent is passed.
        noise_loss_list: of :meth:`DirectInversion.invert`; needed where offsets are added.
        add_offset: add row 0's offset after each step.
        compat: ``"original"`` leaves the controller registered.

    Returns:
        Latents [B, C, h, w], and the noise that they came from.
    """
    compat = chosen_compat(compat)
    if add_offset and (noise_loss_list is None or len(noise_loss_list) != num_inference_steps):
        count = 0 if noise_loss_list is None else len(noise_loss_list)
        raise ValueError(
            f"offsets were asked for {num_inference_steps} steps, and noise_loss_list has {count}: pass what "
            "DirectInversion(model, num_inference_steps).invert gave, or add_offset=False"
        )
    prompt = listed(prompt)
    towards, away = model.encode_prompt(prompt, model._execution_device, 1, True)
    context = torch.cat([away, towards])
    latent, latents = init_latent(latent, model, None, None, generator, len(prompt))
    model.scheduler.set_timesteps(num_inference_steps)
    if compat is None:
        warn_of_prompts(controller, prompt)
    registered = register_attention_control(model, controller, compat)
    try:
        for index, t in enumerate(model.scheduler.timesteps):
            offset = latents.new_zeros(()) if noise_loss_list is None else noise_loss_list[index]
            latents = direct_inversion_p2p_guidance_diffusion_step(
                model, controller, latents, context, t, guidance_scale, offset, add_offset=add_offset
            )
    finally:
        if registered is not None and compat is None:
            registered.restore()
    return latents, latent
