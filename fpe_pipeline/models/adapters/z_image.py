"""Z-Image: blocks with one sequence of image and text tokens, after a few of image tokens and of text tokens alone.

A row's sequence is its image's tokens, its caption's, and padding that nobody attends to. Image and caption are each
filled up to a multiple of 32 tokens before, by learnt tokens that *are* attended to: those of the caption count as its
own, with places of their own, and those of the image stand at no place and are neither. An image's places begin where
its caption ends, and its rotary embedding with them.

diffusers' model takes lists, of latents and of captions, and has no ``attn_processors``: its layers are found by
walking its modules. The pipeline guides in one call, whose rows that see their prompts come first, and may leave the
others out from some step on.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...text_parts import Template, TextPart, conversation
from ..sites import Kind, Site
from ..steps import Step, step_of_scheduler
from .adapter import ModelCall
from .transformer import TransformerAdapter

__all__ = ["ZImageAdapter", "filled_up"]

#: What layers attend to, by where they stand in the model; captions alone (context_refiner) are no edit's.
_KINDS: dict[str, Kind] = {"layers": "joint", "noise_refiner": "image"}
#: Tokens of an image and of a caption are filled up to a multiple of this number.
_MULTIPLE = 32
_OMNI = (
    "Z-Image Omni's sequences hold captions, several pictures and what an encoder saw of them, in another order, which "
    "no edit is told of yet: edit with ZImagePipeline"
)


def _conversation(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    return conversation(pipe.tokenizer, enable_thinking=True)


class ZImageAdapter(TransformerAdapter):
    """diffusers' ``ZImageTransformer2DModel``."""

    family = "z_image"
    turns_by_caption = True
    prompts_first = True
    tells_all_it_encodes = False
    text_parts = (TextPart("tokenizer", ("text_encoder",), _conversation, multiple=_MULTIPLE),)

    def check(self) -> None:
        super().check()
        if any("Omni" in kind.__name__ for kind in type(self.pipe).__mro__):
            raise ValueError(_OMNI)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        patch = module.config.all_patch_size[0]
        # A ControlNet computes its own tokens by the model's noise_refiner, which it shares.
        shared = ("noise_refiner",) if getattr(self.pipe, "controlnet", None) is not None else ()
        counts, sites = dict.fromkeys(_KINDS.values(), 0), []
        for path, layer in module.named_modules():
            within = path.partition(".")[0]
            if within in _KINDS and within not in shared and hasattr(layer, "set_processor"):
                kind = _KINDS[within]
                sites.append(Site(path, "single", kind, counts[kind], layer.heads, 0, (), patch=patch))
                counts[kind] += 1
        return tuple(sites)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        bound = inspect.signature(type(self.module).forward).bind(None, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        latents, captions = given["x"], given["cap_feats"]
        if any(isinstance(row, list) for row in latents):
            raise ValueError(_OMNI)
        sizes = {tuple(row.shape) for row in latents}
        if len(sizes) > 1:
            raise ValueError(f"expected latents of one size, between whose tokens an edit is, got {sorted(sizes)}")
        _, frames, height, width = sizes.pop()
        patch = self.sites[0].patch
        if (frames, given["f_patch_size"], given["patch_size"]) != (1, 1, patch):
            raise ValueError(
                f"expected latents of 1 frame in patches of {patch}, got {frames} in patches of {given['patch_size']} "
                f"and {given['f_patch_size']} frames, whose tokens an edit does not know"
            )
        return ModelCall(
            torch.stack(latents),
            given["t"],
            (height, width),
            text_lengths=_lengths(captions),
            references=-(height // patch * (width // patch)) % _MULTIPLE,
            attends_to_padding=True,
            arguments=(args, kwargs),
        )

    def step(self, call: ModelCall) -> Step:
        return super().step(call) if self.pipe is None else step_of_scheduler(self.pipe.scheduler)


def _lengths(captions: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Text tokens of each row before padding that nobody attends to."""
    return tuple(filled_up(len(caption)) for caption in captions)


def filled_up(tokens: int) -> int:
    """How many tokens the model makes of so many of an image or of a caption."""
    return -(-tokens // _MULTIPLE) * _MULTIPLE
