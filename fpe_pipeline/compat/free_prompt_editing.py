"""Free-Prompt-Editing (Liu et al., CVPR 2024), as its repository has it, on current diffusers.

``from Freeprompt.freeprompt import …`` and its like become ``from fpe_pipeline.compat.free_prompt_editing import …``.
See ``docs/compat/free-prompt-editing.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline

from fpe_kernels import shared_attention

from ..errors import check_guidance, check_positive
from ..sampling.noise_schedule import ddim_inverse_step, require_ddim
from .controlled import Compat, ControlledLayers, LayerCall, controlled_layers, register_controller
from .given import check_count, listed, pixels, window
from .names import unknown_name
from .prompt_to_prompt.controllers import AttentionControl, AttentionStore, EmptyControl
from .prompt_to_prompt.ptp_utils import latent2image, register_attention_control
from .switch import chosen_compat

__all__ = [
    "AttentionControl",
    "AttentionStore",
    "EmptyControl",
    "FreePromptPipeline",
    "SelfAttentionControlEdit",
    "register_attention_control_new",
]

__getattr__ = unknown_name(__name__, "Free-Prompt-Editing", __all__)


class SelfAttentionControlEdit(AttentionControl):
    """Targets take the source's self-attention maps, in layers of at most ``res``² query tokens.

    Args:
        prompts: the source prompt and its targets.
        num_steps: of the run.
        res: the side of the largest maps that are replaced (the app's third argument); or, where
            ``self_replace_steps`` is left out, that (the notebooks' third argument), and 32².
        self_replace_steps: a share s of the steps for the steps ``[0, int(T·s))``, or a pair.

    Raises:
        TypeError: no ``self_replace_steps``.
        ValueError: a number of steps or a side that is none, or shares outside of 0 to 1.
    """

    def __init__(self, prompts: Sequence[str], num_steps: int, res: Any = None, self_replace_steps: Any = None) -> None:
        super().__init__()
        if self_replace_steps is None:
            res, self_replace_steps = None, res
        if self_replace_steps is None:
            raise TypeError("self_replace_steps is missing: the share of the steps in which maps are replaced")
        self.prompts = listed(prompts)
        self.batch_size = len(self.prompts)
        side = 32 if res is None else res
        check_positive(num_steps=num_steps, res=side)
        self.max_tokens = side**2
        replaced = window("self_replace_steps", self_replace_steps).steps(num_steps)
        self.num_self_replace = replaced.start, replaced.stop

    def replace_self_attention(self, attn_base: Any, att_replace: Any, place_in_unet: str) -> Any:
        """The targets' maps [targets, heads, N, N] from the source's [heads, N, N]."""
        if att_replace.shape[2] > self.max_tokens:
            return att_replace
        return attn_base[None].expand(att_replace.shape[0], -1, -1, -1)

    def forward(self, attn: Any, is_cross: bool, place_in_unet: str) -> Any:
        """The map, edited in place."""
        if self._replaces(is_cross):
            if self.rows and self.rows != self.batch_size:
                raise ValueError(
                    f"the controller is made for {self.batch_size} prompts; the batch has {self.rows}: make a "
                    "controller with the prompts of the call"
                )
            by_prompt = attn.reshape(self.batch_size, -1, *attn.shape[1:])
            by_prompt[1:] = self.replace_self_attention(by_prompt[0], by_prompt[1:], place_in_unet)
        return attn

    def _replaces(self, is_cross: bool) -> bool:
        return not is_cross and self.num_self_replace[0] <= self.cur_step < self.num_self_replace[1]

    def attend(self, call: LayerCall) -> torch.Tensor:
        """A layer's attention [B, H, N, E], the shared maps computed once: what :meth:`forward` comes to."""
        rows = call.query.shape[0]
        first = rows // 2 if call.guided else 0
        index = list(range(rows))
        if self._replaces(call.site.kind == "cross") and call.query.shape[2] <= self.max_tokens:
            index[first:] = [first] * (rows - first)
        kept = sorted(set(index))
        chosen = slice(None) if len(kept) == rows else kept
        bias = call.bias if call.bias is None or call.bias.shape[0] == 1 else call.bias[chosen]
        out = shared_attention(
            call.query[chosen],
            call.key[chosen],
            call.value,
            [kept.index(row) for row in index],
            scale=call.scale,
            bias=bias,
            backend=call.backend,
        )
        self.layer_done()
        return out


def register_attention_control_new(
    model: Any, controller: Any, compat: Compat = None, backend: str = "auto"
) -> ControlledLayers | None:
    """Let a controller see and edit every attention map of a pipeline's UNet from here on.

    Args:
        model: a diffusers pipeline with a UNet.
        controller: :class:`SelfAttentionControlEdit`, or one of a user's own; None takes off what is registered.
        compat: ``"original"`` takes the second half of every batch for the conditional one, guidance or not.
        backend: of ``fpe_kernels``.

    Returns:
        What puts the layers back as they were, by ``restore()`` or as a ``with`` block; None for no controller.
    """
    if controller is None:
        return register_attention_control(model, None)
    compat = chosen_compat(compat)
    compute = partial(type(controller).attend, controller) if _is_own(controller) and compat is None else None
    return register_controller(model, controller, compat, backend, compute)


def _is_own(controller: Any) -> bool:
    """Whether a controller does what :class:`SelfAttentionControlEdit` does, and no more."""
    kind = type(controller)
    return isinstance(controller, SelfAttentionControlEdit) and all(
        getattr(kind, name) is getattr(SelfAttentionControlEdit, name)
        for name in ("__call__", "forward", "replace_self_attention", "attend", "_replaces")
    )


class FreePromptPipeline(StableDiffusionPipeline):
    """The repository's pipeline: sampling of several prompts, and DDIM inversion.

    It loads as any diffusers pipeline does; its calls take and give what the original's do.
    """

    @torch.no_grad()
    def image2latent(self, image: Any) -> torch.Tensor:
        """Latents [B, C, h, w] of a picture [B, 3, H, W] in [-1, 1], of a PIL image or of an array [H, W, 3]."""
        encoded = self.vae.encode(pixels(image).to(self._execution_device, self.vae.dtype)).latent_dist.mean
        return (encoded * self.vae.config.scaling_factor).to(self.unet.dtype)

    @torch.no_grad()
    def latent2image(self, latents: torch.Tensor, return_type: str = "np") -> Any:
        """The first picture [H, W, 3], uint8, for "np"; all of them [B, 3, H, W] in [0, 1] for "pt"."""
        if return_type == "np":
            return latent2image(self.vae, latents)[0]
        decoded = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return (decoded / 2 + 0.5).clamp(0, 1) if return_type == "pt" else decoded

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        latents: torch.Tensor | None = None,
        unconditioning: Sequence[torch.Tensor] | None = None,
        neg_prompt: str | None = None,
        ref_intermediate_latents: Sequence[torch.Tensor] | None = None,
        return_intermediates: bool = False,
    ) -> Any:
        """Images [prompts, 3, H, W] in [0, 1], by the pipeline's scheduler.

        Args:
            prompt: the source prompt and its targets; or one, ``batch_size`` times.
            height, width: pixels; default: those of ``latents``, or the model's own.
            num_inference_steps, guidance_scale: of the run; up to 1 there is no unconditional half.
            latents: the noise, [1 | prompts, C, h, w], of variance 1.
            unconditioning: for each step, the unconditional embedding [1, M, C] (null-text inversion).
            neg_prompt: for all prompts.
            ref_intermediate_latents: the source's latents of an inversion, from image to noise, onto which row 0 is put
                before each step.
            return_intermediates: also give the predictions of the image and the latents of all steps, decoded.

        Raises:
            TypeError: prompts that are no texts.
            ValueError: steps or guidance that are no numbers, latents of another size, embeddings or reference latents
                of another number of steps, or with another scheduler than DDIM, which gave them; predictions that the
                scheduler does not give.
        """
        check_positive(batch_size=batch_size, num_inference_steps=num_inference_steps)
        check_guidance(guidance_scale)
        prompts = [prompt] * batch_size if isinstance(prompt, str) else listed(prompt)
        guided = guidance_scale > 1
        towards, away = self.encode_prompt(
            prompts, self._execution_device, 1, guided, neg_prompt and [neg_prompt] * len(prompts)
        )
        latents = self._start(latents, len(prompts), height, width)
        self.scheduler.set_timesteps(num_inference_steps)
        steps = len(self.scheduler.timesteps)
        latents = latents * self.scheduler.init_noise_sigma  # of some schedulers it depends on the steps
        if ref_intermediate_latents is not None or unconditioning is not None:
            require_ddim(self.scheduler, "following an inversion")
        if ref_intermediate_latents is not None:
            source = "invert(..., return_intermediates=True)"
            check_count("ref_intermediate_latents", ref_intermediate_latents, steps + 1, "latents", source)
        if unconditioning is not None:
            check_count("unconditioning", unconditioning, steps, "embeddings", "null-text inversion")
        trajectory, predictions = [latents], [latents]
        registered = controlled_layers(self)
        with nullcontext() if registered is None else registered.guided_as(guided):
            for index, t in enumerate(self.scheduler.timesteps):
                if ref_intermediate_latents is not None:
                    latents = torch.cat([ref_intermediate_latents[-1 - index].to(latents), latents[1:]])
                if unconditioning is not None:
                    away = unconditioning[index].to(towards).expand_as(towards)
                noise = self._noise(latents, t, towards, away if guided else None, guidance_scale)
                step = self.scheduler.step(noise, t, latents)
                latents = step.prev_sample
                if return_intermediates:
                    trajectory.append(latents)
                    predictions.append(self._predicted(step))
        image = self.latent2image(latents, return_type="pt")
        if not return_intermediates:
            return image
        return image, *([self.latent2image(each, "pt") for each in some] for some in (predictions, trajectory))

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        prompt: str | Sequence[str],
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        return_intermediates: bool = False,
    ) -> tuple[torch.Tensor, Any]:
        """DDIM inversion of pictures [B, 3, H, W] in [-1, 1], a PIL image or an array [H, W, 3].

        A registered controller takes no part in it.

        Returns:
            The noise [B, C, h, w]; and the latents, or with ``return_intermediates`` the list of those of all steps,
            from image to noise.

        Raises:
            TypeError: prompts that are no texts, or no picture.
            ValueError: another scheduler than DDIM, pictures of other shapes or values, steps or guidance that are no
                numbers.
        """
        require_ddim(self.scheduler, "inversion")
        check_positive(num_inference_steps=num_inference_steps)
        check_guidance(guidance_scale)
        image = pixels(image)
        prompts = [prompt] * image.shape[0] if isinstance(prompt, str) else listed(prompt)
        if image.shape[0] == 1:
            image = image.expand(len(prompts), -1, -1, -1)
        guided = guidance_scale > 1
        towards, away = self.encode_prompt(prompts, self._execution_device, 1, guided)
        trajectory = [self.image2latent(image)]
        self.scheduler.set_timesteps(num_inference_steps)
        registered = controlled_layers(self)
        with nullcontext() if registered is None else registered.paused():
            for t in reversed(self.scheduler.timesteps):
                noise = self._noise(trajectory[-1], t, towards, away if guided else None, guidance_scale)
                trajectory.append(ddim_inverse_step(self.scheduler, noise, int(t), trajectory[-1]))
        return trajectory[-1], trajectory if return_intermediates else trajectory[0]

    def _predicted(self, step: Any) -> torch.Tensor:
        """The image that a step of the scheduler foresees."""
        predicted = getattr(step, "pred_original_sample", None)
        if predicted is None:
            raise ValueError(
                "return_intermediates=True shows the image that each step foresees, which "
                f"{type(self.scheduler).__name__} does not say: set "
                "pipe.scheduler = fpe_pipeline.ddim_scheduler(pipe.scheduler), or leave it out"
            )
        return cast(torch.Tensor, predicted)

    def _noise(
        self,
        latents: torch.Tensor,
        t: Any,
        towards: torch.Tensor,
        away: torch.Tensor | None,
        guidance_scale: float,
    ) -> torch.Tensor:
        latents = self.scheduler.scale_model_input(latents, t)
        if away is None:
            return self.unet(latents, t, encoder_hidden_states=towards).sample
        batch, context = torch.cat([latents] * 2), torch.cat([away, towards])
        unconditional, conditional = self.unet(batch, t, encoder_hidden_states=context).sample.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _start(self, latents: torch.Tensor | None, rows: int, height: int | None, width: int | None) -> torch.Tensor:
        factor, size = self.vae_scale_factor, self.unet.config.sample_size
        asked = [None if side is None else side // factor for side in (height, width)]
        if latents is None:
            shape = (rows, self.unet.config.in_channels, *(size if side is None else side for side in asked))
            return torch.randn(shape, device=self._execution_device, dtype=self.unet.dtype)
        sides = [given if side is None else side for side, given in zip(asked, latents.shape[-2:], strict=True)]
        if tuple(latents.shape[-2:]) != tuple(sides) or latents.shape[0] not in (1, rows):
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} were passed for {rows} prompts of {sides[0]} × {sides[1]} "
                "latent pixels: pass one row, or one for each prompt, of that size"
            )
        return latents.to(self._execution_device, self.unet.dtype).expand(rows, -1, -1, -1)
