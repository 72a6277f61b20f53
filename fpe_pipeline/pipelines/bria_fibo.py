"""`FreePromptPipeline` for Bria FIBO, whose blocks read a text by several layers of its encoder."""

from __future__ import annotations

from typing import Any

from diffusers import BriaFiboPipeline

from .flow import FlowEditing

__all__ = ["FreePromptBriaFiboPipeline"]


class FreePromptBriaFiboPipeline(FlowEditing, BriaFiboPipeline):
    """Edit an image, generated or real, into target prompts, on Bria FIBO.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`; an inversion that is guided is so by the empty prompt. Recordings serve edits of
    image tokens and of words. An empty prompt is as long as the longest of its call, so that a recording, which knows
    no other prompts, is of sources and for targets that say something.
    """

    parent = BriaFiboPipeline
    kept_in_loop = "text layers and masks of padding"
    parts = ("transformer", "vae", "text_encoder")

    def _loop(self, arguments: dict[str, Any]) -> Any:
        if arguments.get("do_patching"):
            raise ValueError(
                "do_patching=True makes a token of 2 x 2 latents, and FIBO's model has one for each: leave it out"
            )
        return super()._loop(arguments)
