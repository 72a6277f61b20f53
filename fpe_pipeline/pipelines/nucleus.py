"""`FreePromptPipeline` for Nucleus-Image."""

from __future__ import annotations

from typing import Any

from diffusers import NucleusMoEImagePipeline

from ..text_parts import plain_tokenizer
from .flow import FlowEditing

__all__ = ["FreePromptNucleusMoEImagePipeline"]


class FreePromptNucleusMoEImagePipeline(FlowEditing, NucleusMoEImagePipeline):
    """Edit an image, generated or real, into target prompts, on Nucleus-Image.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`; an inversion that is guided is so by the empty prompt, and scaled as the pipeline
    scales its guidance. Recordings serve edits of words too.
    """

    parent = NucleusMoEImagePipeline
    kept_in_loop = "masks of padding"
    parts = ("transformer", "vae", "text_encoder")
    told = ("default_return_index", "default_max_sequence_length")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer inside of the processor, by which edits find words."""
        return plain_tokenizer(self.processor)
