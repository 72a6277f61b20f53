"""The nodes: one puts the edit into a model, one makes prompts and latents of a source and its targets."""

from __future__ import annotations

import math
from typing import Any

import torch

from .attention import SharedMaps

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "FreePromptBatch", "FreePromptModel"]

#: Every block that a UNet of ComfyUI may have; those that one lacks are never asked for.
_BLOCKS = [*(("input", n) for n in range(12)), ("middle", 0), ("middle", 1), *(("output", n) for n in range(12))]
_CATEGORY = "model_patches/fpe"
#: Pixels of a latent's side, of the models that have such UNets.
_FACTOR = 8


class FreePromptModel:
    """A model in which the images of a batch have the self-attention maps of its first."""

    CATEGORY = _CATEGORY
    DESCRIPTION = (
        "Targets keep the structure of the batch's first image: its self-attention maps, in some of the steps."
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "edited"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"min": 0.0, "max": 1.0, "step": 0.05}
        return {
            "required": {
                "model": ("MODEL",),
                "start": ("FLOAT", {"default": 0.0, **share, "tooltip": "first edited step, as a share of all"}),
                "stop": ("FLOAT", {"default": 0.8, **share, "tooltip": "first step that is the target's own again"}),
                "strength": ("FLOAT", {"default": 1.0, **share, "tooltip": "below 1: blended with the target's map"}),
                "least_level": ("INT", {"default": 1, "min": 0, "max": 3, "tooltip": "0: the finest layers too"}),
            }
        }

    def edited(self, model: Any, start: float, stop: float, strength: float, least_level: int) -> tuple[Any]:
        """A clone of the model, with its self-attention replaced.

        Raises:
            ValueError: another node has replaced it already, or the window holds no step.
        """
        if start >= stop:
            raise ValueError(f"expected start below stop, got {start} and {stop}: no step is edited")
        options = model.model_options.get("transformer_options", {})
        if options.get("patches_replace", {}).get("attn1"):
            raise ValueError(
                "another node has replaced this model's self-attention, and one layer has one replacement: "
                "connect the model as it was before that node"
            )
        patched, patch = model.clone(), SharedMaps(start, stop, strength, least_level)
        for block, number in _BLOCKS:
            patched.set_model_attn1_replace(patch, block, number)
        return (patched,)


class FreePromptBatch:
    """Prompts of a source and its targets as one conditioning, and latents that start from the same noise."""

    CATEGORY = _CATEGORY
    DESCRIPTION = "Positive prompts and empty latents: the source first, then each line of targets, from one noise."
    RETURN_TYPES = ("CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "latent")
    FUNCTION = "batch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 512, "min": 64, "max": 8192, "step": _FACTOR}
        return {
            "required": {
                "clip": ("CLIP",),
                "source": ("STRING", {"multiline": True, "dynamicPrompts": True}),
                "targets": ("STRING", {"multiline": True, "dynamicPrompts": True, "tooltip": "one a line"}),
                "width": ("INT", side),
                "height": ("INT", side),
            }
        }

    def batch(self, clip: Any, source: str, targets: str, width: int, height: int) -> tuple[Any, dict[str, Any]]:
        """(conditioning of as many rows as prompts, latents whose rows are given the noise of the first).

        Raises:
            ValueError: no target.
        """
        prompts = [source.strip(), *(line.strip() for line in targets.splitlines() if line.strip())]
        if len(prompts) < 2:
            raise ValueError("expected a target prompt a line, got none")
        words, pooled = zip(*(_encoded(clip, prompt) for prompt in prompts), strict=True)
        length = math.lcm(*(one.shape[1] for one in words))
        # Words that are repeated as a whole share their attention among the repetitions: the output is the same.
        rows = torch.cat([one.repeat(1, length // one.shape[1], 1) for one in words])
        known = {} if pooled[0] is None else {"pooled_output": torch.cat(pooled)}
        samples = torch.zeros(len(prompts), 4, height // _FACTOR, width // _FACTOR)
        return [[rows, known]], {"samples": samples, "batch_index": [0] * len(prompts)}


def _encoded(clip: Any, prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings [1, tokens, channels] of a prompt, and its pooled one."""
    return clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)


NODE_CLASS_MAPPINGS = {"FreePromptModel": FreePromptModel, "FreePromptBatch": FreePromptBatch}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FreePromptModel": "Free-Prompt-Editing",
    "FreePromptBatch": "Free-Prompt source and targets",
}
