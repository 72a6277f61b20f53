"""`FreePromptPipeline` for AuraFlow, and for what is made of it, such as Pony V7."""

from __future__ import annotations

from diffusers import AuraFlowPipeline

from .flow import FlowEditing

__all__ = ["FreePromptAuraFlowPipeline"]


class FreePromptAuraFlowPipeline(FlowEditing, AuraFlowPipeline):
    """Edit an image, generated or real, into target prompts, on AuraFlow.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`; an inversion that is guided is so by the empty prompt.
    """

    parent = AuraFlowPipeline
    parts = ("transformer", "vae", "text_encoder")
