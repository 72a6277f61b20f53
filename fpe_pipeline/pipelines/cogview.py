"""`FreePromptPipeline` for CogView 4, whose model is told its image's size beside a text."""

from __future__ import annotations

from diffusers import CogView4Pipeline

from .flow import FlowEditing

__all__ = ["FreePromptCogView4Pipeline"]


class FreePromptCogView4Pipeline(FlowEditing, CogView4Pipeline):
    """Edit an image, generated or real, into target prompts, on CogView 4.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`; an inversion that is guided is so by the empty prompt. Texts of a call are padded
    to the longest, in multiples of 16 tokens, and padding is attended to: the source of an inversion or of a recording
    is encoded alone, so that prompts of about one length serve it best, and a replay refuses targets that are longer
    than their source by such a multiple.
    """

    parent = CogView4Pipeline
    kept_in_loop = "sizes of images"
    parts = ("transformer", "vae", "text_encoder")
