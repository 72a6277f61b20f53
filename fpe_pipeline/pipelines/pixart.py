"""`FreePromptPipeline` for PixArt-α and PixArt-Σ, transformers whose layers are of a UNet's kinds and whose noise DDIM
takes away."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline

from ..sampling.step_end import told_of_steps
from ..sampling.unet_conditions import UNetConditions
from .unet_editing import UNetEditing

__all__ = ["FreePromptPixArtAlphaPipeline", "FreePromptPixArtSigmaPipeline"]


class _PixArtEditing(UNetEditing):
    denoiser_name = "transformer"
    parts = ("transformer", "vae", "text_encoder")
    kept_in_loop = "text embeddings and their masks"
    masks_text = True
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    @property
    def pixel_multiple(self) -> int:
        """Of what the sides of images are multiples, in pixels: of a token, which is several latent pixels."""
        multiple: int = self.vae_scale_factor * self.transformer.config.patch_size
        return multiple

    @property
    def text_tokens(self) -> int:
        """Of a prompt, with its padding."""
        tokens: int = self.parent_default("max_sequence_length")
        return tokens

    @torch.no_grad()
    def conditions(self, prompt: str, guided: bool, size: tuple[int, int]) -> UNetConditions:
        """The prompt's embeddings [1, tokens, channels] and which are no padding [1, tokens], behind the empty one's
        where it is guided; where the model is told its images' size, that as well."""
        states, mask, unconditional, away = self.encode_prompt(
            prompt, guided, device=self._execution_device, clean_caption=self.parent_default("clean_caption"),
            max_sequence_length=self.text_tokens,
        )  # fmt: skip
        if guided:
            states, mask = torch.cat([unconditional, states]), torch.cat([away, mask])
        return UNetConditions(states, self._told_of_size(size, states), mask)

    def _told_of_size(self, size: tuple[int, int], like: torch.Tensor) -> dict[str, torch.Tensor]:
        """``added_cond_kwargs`` for images of (height, width) pixels, each [rows, …]."""
        return {}

    def _loop(self, callback: Any, tensor_inputs: list[str], arguments: dict[str, Any]) -> tuple[Any, ...]:
        """The parent's call, whose loop has no ``callback_on_step_end``."""
        with told_of_steps(self, callback, tensor_inputs):
            made: tuple[Any, ...] = self.parent.__call__(self, return_dict=False, **self._of_parent(arguments))
            return made

    def _of_parent(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call as the parent takes them.

        Raises:
            ValueError: those that latents do not go with.
        """
        told = dict(arguments)
        if told.get("negative_prompt") is None and told.get("negative_prompt_embeds") is None:
            told["negative_prompt"] = ""  # of None the parent would make a text
        if told.setdefault("use_resolution_binning", False) and told.get("latents") is not None:
            raise ValueError(
                "use_resolution_binning=True makes images of a size that the model was trained for and scales them, "
                "and latents, given or of an inversion, have a size of their own: leave out one or the other"
            )
        return told


class FreePromptPixArtAlphaPipeline(_PixArtEditing, PixArtAlphaPipeline):
    """Edit an image, generated or real, into target prompts, on PixArt-α.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers, and by ``from_pretrained`` of one that
    was saved; loads, saves and offloads as that does. Images have the size that is asked for;
    ``use_resolution_binning=True`` makes them of a size that the model was trained for and scales them, as diffusers'
    pipeline does unasked, where neither latents nor an inversion have a size of their own. `keep_source=False` and
    "null-text" inversion, which change rows or texts between steps, are refused, and ``callback_on_step_end`` is given
    latents alone: the loop of diffusers' pipeline keeps the rest to itself. Recordings serve edits of self-attention.

    Example:
        >>> from diffusers import PixArtAlphaPipeline
        >>> from fpe_pipeline import FreePromptPipeline, ddim_scheduler
        >>> pixart = PixArtAlphaPipeline.from_pretrained("PixArt-alpha/PixArt-XL-2-1024-MS")
        >>> pipe = FreePromptPipeline.from_pipe(pixart)
        >>> pipe.scheduler = ddim_scheduler(pipe.scheduler)
        >>> inversion = pipe.invert("beach.jpg", "a photo of a red car on the beach", method="direct")
        >>> out = pipe(inversion=inversion, target_prompt="a photo of a blue car on the beach")
    """

    parent = PixArtAlphaPipeline

    def _told_of_size(self, size: tuple[int, int], like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Height and width [rows, 2] and their ratio [rows, 1], where the model of 1024 pixels is told them."""
        if self.transformer.config.sample_size != 128:  # by which diffusers' loop decides
            return {}
        height, width = size
        told = {"resolution": [height, width], "aspect_ratio": [height / width]}
        return {name: like.new_tensor([numbers]).expand(len(like), -1) for name, numbers in told.items()}

    def _of_parent(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments["num_inference_steps"] == 1 and arguments.get("latents") is not None:
            raise ValueError(
                "diffusers' loop of PixArt-α takes of a run of one step what the model thinks the clean image is, and "
                "not where the step leads, so that no source can be held or recorded: take two steps or more"
            )
        return super()._of_parent(arguments)


class FreePromptPixArtSigmaPipeline(_PixArtEditing, PixArtSigmaPipeline):
    """Edit an image, generated or real, into target prompts, on PixArt-Σ.

    Used as `FreePromptPixArtAlphaPipeline`, but that its model is not told the images' size.
    """

    parent = PixArtSigmaPipeline
