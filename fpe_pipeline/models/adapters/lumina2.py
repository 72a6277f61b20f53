"""Lumina 2: blocks with one sequence of text and image tokens, after a few of image tokens alone.

A row's sequence is its caption's tokens, its image's tokens, and padding, so that the image begins elsewhere in rows
of other captions, and its rotary embedding with it. diffusers' model has no ``attn_processors``: its layers are found
by walking its modules. The pipeline guides by a second call, with the prompts first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import Template, TextPart
from ..sites import Kind, Site
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .padding import counted_tokens

__all__ = ["Lumina2Adapter", "template"]

#: What layers attend to, by where they stand in the model; captions alone (context_refiner) are no edit's.
_KINDS: dict[str, Kind] = {"layers": "joint", "noise_refiner": "image"}


#: What the pipeline writes between the text of the system and a prompt.
_BEGINNING = " <Prompt Start> "


def template(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    """What the pipeline writes around a prompt; a negative prompt stands alone."""
    given = arguments.get("system_prompt")
    return Template((pipe.system_prompt if given is None else given) + _BEGINNING)


class Lumina2Adapter(NamedCallsAdapter):
    """diffusers' ``Lumina2Transformer2DModel``."""

    family = "lumina2"
    turns_by_caption = True
    text_parts = (TextPart("tokenizer", ("text_encoder",), template),)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        counts, sites = dict.fromkeys(_KINDS.values(), 0), []
        for path, layer in module.named_modules():
            kind = _KINDS.get(path.partition(".")[0]) if hasattr(layer, "set_processor") else None
            if kind is not None:
                sites.append(
                    Site(path, "single", kind, counts[kind], layer.heads, 0, (), patch=module.config.patch_size)
                )
                counts[kind] += 1
        return tuple(sites)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample = given["hidden_states"]
        return ModelCall(
            sample,
            given["timestep"],
            (sample.shape[-2], sample.shape[-1]),
            half=self._half(),
            text_lengths=counted_tokens(given["encoder_attention_mask"]),
            arguments=(args, kwargs),
        )
