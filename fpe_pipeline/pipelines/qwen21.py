"""`FreePromptPipeline` for Qwen-Image 2.1, whose images stand behind the longest text of a call."""

from __future__ import annotations

from typing import Any

from diffusers import QwenImage21Pipeline

from ..models.adapters.families import adapter_of
from ..recordings.padded_texts import pad_texts
from ..text_parts import plain_tokenizer
from .flow import FlowEditing

__all__ = ["FreePromptQwenImage21Pipeline"]


class FreePromptQwenImage21Pipeline(FlowEditing, QwenImage21Pipeline):
    """Edit an image, generated or real, into target prompts, on Qwen-Image 2.1.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`; it guides where ``negative_prompt`` is passed, by ``true_cfg_scale``. An image
    stands behind the longest text of its call; with ``max_sequence_length``, which diffusers' pipeline has not, behind
    so many tokens, to which shorter prompts are padded and longer ones refused. A recording serves targets as long as
    its source, or as its ``max_sequence_length`` says; edits of image tokens and of words.
    """

    parent = QwenImage21Pipeline
    kept_in_loop = "masks of padding"
    parts = ("transformer", "vae", "text_encoder")
    #: To how many tokens prompts are padded in the call under way; 0 for those of the longest.
    padded_tokens: int = 0
    told = ("sys_prompt", "prompt_template_t2i", "prompt_template_ti2i", "_drop_idx")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer inside of the processor, by which edits find words."""
        return plain_tokenizer(self.processor)

    @classmethod
    def parent_options(cls) -> frozenset[str]:
        """The arguments of a call in diffusers that do something beside a size, and what is made up here."""
        return (super().parent_options() - {"output_resolution"}) | {"max_sequence_length"}

    def _loop(self, arguments: dict[str, Any]) -> Any:
        told = dict(arguments)
        tokens = told.pop("max_sequence_length", None)
        if not tokens:
            return super()._loop(told)
        self.flow().check_texts(told["prompt"] or (), tokens)
        adapter = adapter_of(self)
        leave = adapter.follow()
        unpad = pad_texts(adapter, {True: tokens})
        self.padded_tokens = tokens
        try:
            return super()._loop(told)
        finally:
            self.padded_tokens = 0
            unpad()
            leave()
