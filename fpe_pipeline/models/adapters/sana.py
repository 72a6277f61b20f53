"""Sana: blocks of linear self-attention over image tokens, which has no map, and of cross-attention over its text.

The batch is [unconditional, conditional] in one call, or the prompts alone in Sana-Sprint; padding of texts is masked.
Prompts are encoded in small letters, behind an instruction of which the model receives the last token, and the token
that begins every text; negative prompts without one. Sana-Video's blocks are the same over the tokens of all frames.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...text_parts import Template, TextPart
from ..sites import Site
from ..steps import Step, step_of_scheduler
from .adapter import Half, ModelCall
from .transformer import TransformerAdapter, self_and_cross

__all__ = ["SanaAdapter", "SanaVideoAdapter"]


def _template(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    parameters = inspect.signature(type(pipe).encode_prompt).parameters
    length, instruction = (
        arguments.get(name, parameters[name].default) for name in ("max_sequence_length", "complex_human_instruction")
    )
    before = "\n".join(instruction or ())
    dropped = len(pipe.tokenizer.encode(before)) - 2 if before and pipe.tokenizer is not None else 0

    def received(tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([tokens[:, :1], tokens[:, 1 - length :]], dim=1)

    return Template(before, dropped=dropped, received=received, lowers=True)


class SanaAdapter(TransformerAdapter):
    """diffusers' ``SanaTransformer2DModel``."""

    family = "sana"
    text_parts = (TextPart("tokenizer", ("text_encoder",), _template, is_padded=True),)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        return tuple(self_and_cross("transformer_blocks", module.transformer_blocks, int(module.config.patch_size)))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample = given["hidden_states"]
        # Pipelines of distilled models have no guidance by negative prompts.
        guides = self.pipe is None or hasattr(type(self.pipe), "do_classifier_free_guidance")
        half: Half = "as guided" if guides else "conditional"
        return ModelCall(sample, given["timestep"], sample.shape[-2:], half=half, arguments=(args, kwargs))

    def step(self, call: ModelCall) -> Step:
        return super().step(call) if self.pipe is None else step_of_scheduler(self.pipe.scheduler)


class SanaVideoAdapter(SanaAdapter):
    """diffusers' ``SanaVideoTransformer3DModel``."""

    repeats_pictures = True

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        _, patch, _ = module.config.patch_size
        return tuple(self_and_cross("transformer_blocks", module.transformer_blocks, patch))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        module: Any = self.module
        call = super().read(args, kwargs)
        frames, height, width = call.sample.shape[-3:]
        return replace(call, size=(height, width, frames // module.config.patch_size[0]))
