"""Cosmos Predict 2 and 2.5, and Anima, which is made of it: blocks of self-attention over all tokens of a picture or a
video, and of cross-attention over text, whose padding is zeros that are attended to.

Pipelines guide by a second call, after the one that sees the prompts; diffusers calls Anima from modular pipelines.
Anima's text tokens are T5's, which another model has read beside what a language model made of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...text_parts import Template, TextPart
from ..sites import Site
from .adapter import ModelCall, identity
from .named_calls import NamedCallsAdapter
from .padding import warn_of_padding
from .transformer import self_and_cross

__all__ = ["CosmosAdapter"]


def _padded(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    """Nothing around a prompt; shorter texts are padded to what the conditioner says."""
    return Template("", at_least=pipe.text_conditioner.config.min_sequence_length)


class CosmosAdapter(NamedCallsAdapter):
    """diffusers' ``CosmosTransformer3DModel``."""

    family = "cosmos"

    def __init__(self, pipe: Any | None, model: Any) -> None:
        super().__init__(pipe, model)
        reader = getattr(pipe, "text_encoder", None)
        if hasattr(pipe, "text_conditioner"):
            self.text_parts = (TextPart("t5_tokenizer", ("text_conditioner",), _padded),)
        elif reader is not None and "T5" not in type(identity(reader)).__name__:
            self.words_refused = (
                f"{type(pipe).__name__} encodes prompts inside a conversation that it does not tell, so that no word "
                "is found there: use an edit that looks for none, such as FreePromptEdit or MasaCtrlEdit"
            )

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        _, patch, _ = module.config.patch_size
        return tuple(self_and_cross("transformer_blocks", module.transformer_blocks, patch))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        module: Any = self.module
        sample = given["hidden_states"]
        frames, height, width = sample.shape[-3:]
        size = (height, width, frames // module.config.patch_size[0])
        return ModelCall(sample, given["timestep"], size, half=self._half(), arguments=(args, kwargs))

    def follow(self) -> Callable[[], None]:
        leave = super().follow()
        conditioner = getattr(self.pipe, "text_conditioner", None)
        if not isinstance(conditioner, torch.nn.Module):
            return leave
        told = conditioner.register_forward_pre_hook(torch.compiler.disable(_tell_of_padding), with_kwargs=True)

        def end() -> None:
            told.remove()
            leave()

        return end


def _tell_of_padding(conditioner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Warn where texts of one call get more padding than each has alone, to which the model attends."""
    mask = kwargs.get("target_attention_mask")
    if mask is None:
        return
    least = conditioner.config.min_sequence_length
    alone = [max(count, least) for count in mask.sum(1).tolist()]
    warn_of_padding("Anima", alone, max(mask.shape[1], least), least)
