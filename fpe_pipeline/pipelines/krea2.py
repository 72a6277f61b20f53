"""`FreePromptPipeline` for Krea 2, whose texts are padded in the middle of what its pipeline writes around them."""

from __future__ import annotations

from diffusers import Krea2Pipeline

from .flow import FlowEditing

__all__ = ["FreePromptKrea2Pipeline"]


class FreePromptKrea2Pipeline(FlowEditing, Krea2Pipeline):
    """Edit an image, generated or real, into target prompts, on Krea 2.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`, but that its pipeline counts guidance from 0 on, at which there is none (distilled
    models').
    """

    parent = Krea2Pipeline
    kept_in_loop = "masks of padding"
    parts = ("transformer", "vae", "text_encoder")
    unguided = 0.0
    told = (
        "prompt_template_encode_prefix",
        "prompt_template_encode_suffix",
        "prompt_template_encode_start_idx",
        "prompt_template_encode_num_suffix_tokens",
    )
