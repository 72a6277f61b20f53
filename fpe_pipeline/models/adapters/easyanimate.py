"""EasyAnimate: blocks with one softmax over its text and the tokens of all frames, of which those of frames are turned.

Of its blocks the first ones have weights of the text's own. Texts are padded to one length, and padding is attended to.
The batch is [unconditional, conditional] in one call; a prompt is encoded inside a conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import Template, TextPart
from ..sites import Site
from ..steps import Step, step_of_scheduler
from .adapter import ModelCall
from .transformer import TransformerAdapter

__all__ = ["EasyAnimateAdapter"]


def _conversation(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    if pipe.tokenizer is None:
        return Template("")
    said = [{"role": "user", "content": [{"type": "text", "text": "{}"}]}]
    written = pipe.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    before, _, after = written.partition("{}")
    return Template(before, after)


class EasyAnimateAdapter(TransformerAdapter):
    """diffusers' ``EasyAnimateTransformer3DModel``."""

    family = "easyanimate"
    text_parts = (TextPart("tokenizer", ("text_encoder",), _conversation, is_padded=True),)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        patch = int(module.config.patch_size)
        return tuple(
            Site(
                f"transformer_blocks.{index}.attn1",
                "single" if block.attn1.add_q_proj is None else "dual",
                "joint",
                index,
                block.attn1.heads,
                0,
                (),
                patch=patch,
            )
            for index, block in enumerate(module.transformer_blocks)
        )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample = given["hidden_states"]
        frames, height, width = sample.shape[-3:]
        return ModelCall(sample, given["timestep"], (height, width, frames), arguments=(args, kwargs))

    def step(self, call: ModelCall) -> Step:
        return super().step(call) if self.pipe is None else step_of_scheduler(self.pipe.scheduler)
