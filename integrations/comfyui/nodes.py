"""The nodes: one puts the edit into a model, one makes prompts and latents of a source and its targets."""

from __future__ import annotations

import math
from typing import Any

import torch

from .attention import SharedMaps
from .joint import SERVED, JointMaps, served

__all__ = [
    "NODE_CLASS_MAPPINGS",
    "NODE_DISPLAY_NAME_MAPPINGS",
    "FreePromptBatch",
    "FreePromptModel",
    "FreePromptTransformer",
]

#: Every block that a UNet of ComfyUI may have; those that one lacks are never asked for.
_BLOCKS = [*(("input", n) for n in range(12)), ("middle", 0), ("middle", 1), *(("output", n) for n in range(12))]
_CATEGORY = "model_patches/fpe"
#: Pixels of a latent's side, of the models that have such UNets; ComfyUI fits empty latents to those of others.
_FACTOR = 8
_SHARE = {"min": 0.0, "max": 1.0, "step": 0.05}
_WINDOW = {
    "start": ("FLOAT", {"default": 0.0, **_SHARE, "tooltip": "first edited step, as a share of all"}),
    "stop": ("FLOAT", {"default": 0.8, **_SHARE, "tooltip": "first step that is the target's own again"}),
    "strength": ("FLOAT", {"default": 1.0, **_SHARE, "tooltip": "below 1: blended with the target's map"}),
}
_OVERRIDE = "optimized_attention_override"
#: Tokens of the encoders that UNets have. Their layers attend to words alone, so that words may be repeated.
_CLIPS = frozenset("lgh")


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
        return {
            "required": {
                "model": ("MODEL",),
                **_WINDOW,
                "least_level": ("INT", {"default": 1, "min": 0, "max": 3, "tooltip": "0: the finest layers too"}),
            }
        }

    def edited(self, model: Any, start: float, stop: float, strength: float, least_level: int) -> tuple[Any]:
        """A clone of the model, with its self-attention replaced.

        Raises:
            ValueError: the model is no UNet, another node has replaced it already, or the window holds no step.
        """
        _check_window(start, stop)
        inside = model.get_model_object("diffusion_model")
        if not hasattr(inside, "input_blocks"):
            raise ValueError(
                f"expected a UNet, got {type(inside).__name__}, which has no such layers: take the node "
                "'Free-Prompt-Editing (transformers)'"
            )
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


class FreePromptTransformer:
    """A transformer in which the images of a batch have the image's part of the maps of its first."""

    CATEGORY = _CATEGORY
    DESCRIPTION = "Targets keep the structure of the batch's first image, in FLUX, Qwen-Image and other transformers."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "edited"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kind, stop = _WINDOW["stop"]
        return {"required": {"model": ("MODEL",), **_WINDOW, "stop": (kind, {**stop, "default": 0.2})}}

    def edited(self, model: Any, start: float, stop: float, strength: float) -> tuple[Any]:
        """A clone of the model, whose attention in some of the steps is Free-Prompt-Editing's.

        Raises:
            ValueError: the model is none of these transformers, is edited already, or the window holds no step; or
                this ComfyUI is too old.
        """
        _check_window(start, stop)
        inside = model.get_model_object("diffusion_model")
        if not served(inside):
            node = "'Free-Prompt-Editing'" if hasattr(inside, "input_blocks") else "none here"
            raise ValueError(
                f"expected a model of ComfyUI's {', '.join(SERVED)}, got {type(inside).__name__}: the node for that is "
                f"{node}"
            )
        earlier = model.model_options.get("transformer_options", {}).get(_OVERRIDE)
        if isinstance(earlier, JointMaps):
            raise ValueError("expected a model that is not edited yet, got one of this node: change that node's window")
        if not hasattr(model, "add_wrapper_with_key"):
            raise ValueError("expected a ComfyUI of 2025 or later, got one whose models take no wrappers: update it")
        patched, maps = model.clone(), JointMaps(start, stop, strength, earlier)
        options = patched.model_options.get("transformer_options", {})
        patched.model_options["transformer_options"] = {**options, _OVERRIDE: maps}
        patched.add_wrapper_with_key("apply_model", "fpe", maps.around)
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
            },
            "optional": {
                "empty": ("LATENT", {"tooltip": "an empty latent of another kind, in the place of width and height"}),
            },
        }

    def batch(
        self, clip: Any, source: str, targets: str, width: int, height: int, empty: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """(conditioning of as many rows as prompts, latents whose rows are given the noise of the first).

        Raises:
            ValueError: no target, or prompts of other numbers of tokens where their tokens attend beside the image's.
        """
        prompts = [source.strip(), *(line.strip() for line in targets.splitlines() if line.strip())]
        if len(prompts) < 2:
            raise ValueError("expected a target prompt a line, got none")
        encoded = [_encoded(clip, prompt) for prompt in prompts]
        samples = torch.zeros(1, 4, height // _FACTOR, width // _FACTOR) if empty is None else empty["samples"][:1]
        samples = samples.repeat(len(prompts), *(1,) * (samples.ndim - 1))
        latent = {**(empty or {}), "samples": samples, "batch_index": [0] * len(prompts)}
        return [_joined(prompts, encoded)], latent


def _check_window(start: float, stop: float) -> None:
    if start >= stop:
        raise ValueError(f"expected start below stop, got {start} and {stop}: no step is edited")


def _encoded(clip: Any, prompt: str) -> tuple[torch.Tensor, dict[str, Any], bool]:
    """Embeddings [1, tokens, channels] of a prompt, what comes with them, and whether words may be repeated."""
    tokens = clip.tokenize(prompt)
    [[words, known]] = clip.encode_from_tokens_scheduled(tokens)
    return words, known, _CLIPS.issuperset(tokens)


def _joined(prompts: list[str], encoded: list[tuple[torch.Tensor, dict[str, Any], bool]]) -> list[Any]:
    """[embeddings of a row for each prompt, what comes with them]."""
    words, known, may_repeat = zip(*encoded, strict=True)
    lengths = [one.shape[1] for one in words]
    if len(set(lengths)) > 1 and not all(may_repeat):
        raise ValueError(
            f"expected prompts of as many tokens, since images attend to every token in such a model, got {lengths}: "
            "write " + " and ".join(map(repr, prompts)) + " with as many words"
        )
    length = math.lcm(*lengths)
    # Words that are repeated as a whole share their attention among the repetitions: the output is the same.
    rows = torch.cat([one.repeat(1, length // one.shape[1], 1) for one in words])
    names = dict.fromkeys(name for one in known for name in one)
    return [rows, {name: _stacked(name, [one.get(name) for one in known]) for name in names}]


def _stacked(name: str, values: list[Any]) -> Any:
    """What comes with the embeddings of each prompt, as one for all rows."""
    if all(isinstance(value, torch.Tensor) for value in values):
        if len({value.shape for value in values}) > 1:
            raise ValueError(f"expected {name} of one size for all prompts, got {[list(v.shape) for v in values]}")
        if values[0].shape[:1] == (1,):
            return torch.cat(values)
    elif any(isinstance(value, torch.Tensor) for value in values):
        raise ValueError(f"expected {name} of every prompt or of none, got it of some: write prompts that are alike")
    if not all(_same(value, values[0]) for value in values):
        raise ValueError(
            f"expected {name} as tensors of one row, or the same for all prompts, got {type(values[0]).__name__} that "
            "differ: encode the prompts by a text encoder of a model that one of these nodes edits"
        )
    return values[0]


def _same(one: Any, other: Any) -> bool:
    """Whether two things that come with embeddings are equal, tensors in them too."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(each, other[name]) for name, each in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


NODE_CLASS_MAPPINGS = {
    "FreePromptModel": FreePromptModel,
    "FreePromptTransformer": FreePromptTransformer,
    "FreePromptBatch": FreePromptBatch,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FreePromptTransformer": "Free-Prompt-Editing (transformers)",
    "FreePromptModel": "Free-Prompt-Editing",
    "FreePromptBatch": "Free-Prompt source and targets",
}
