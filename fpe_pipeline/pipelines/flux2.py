"""`FreePromptPipeline` for FLUX.2 [dev] and [klein], whose calls may be shown pictures beside text."""

from __future__ import annotations

from diffusers import Flux2KleinPipeline, Flux2Pipeline

from .flow import FlowEditing

__all__ = ["FreePromptFlux2KleinPipeline", "FreePromptFlux2Pipeline"]


class _Flux2Editing(FlowEditing):
    kept_in_loop = "places of tokens"
    parts = ("transformer", "vae", "text_encoder")


class FreePromptFlux2Pipeline(_Flux2Editing, Flux2Pipeline):
    """Edit an image, generated or real, into target prompts, on FLUX.2 [dev].

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptFluxPipeline`, with a guidance for each prompt too. Recordings serve edits that look for no word.
    """

    parent = Flux2Pipeline
    told = ("system_message",)

    def is_guided_at(self, scale: float) -> bool:
        """Never: the model is told its guidance."""
        return False


class FreePromptFlux2KleinPipeline(_Flux2Editing, Flux2KleinPipeline):
    """Edit an image, generated or real, into target prompts, on FLUX.2 [klein].

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`, but that it takes no negative prompt: guidance, which distilled models are without,
    is by the empty one. Recordings serve edits of words too.
    """

    parent = Flux2KleinPipeline

    def is_guided_at(self, scale: float) -> bool:
        """Whether calls with this ``guidance_scale`` have rows that do not see their prompts."""
        return scale > self.unguided and not self.config.is_distilled
