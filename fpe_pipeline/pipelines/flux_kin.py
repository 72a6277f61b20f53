"""`FreePromptPipeline` for models with the blocks of FLUX.1: Ovis-Image, LongCat-Image and Bria."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import BriaPipeline, LongCatImagePipeline, OvisImagePipeline

from ..sampling.kin_models import reading
from ..sampling.step_end import Call, told_of_steps
from .flow import FlowEditing

__all__ = [
    "FreePromptBriaPipeline",
    "FreePromptLongCatImagePipeline",
    "FreePromptOvisImagePipeline",
]


class FreePromptOvisImagePipeline(FlowEditing, OvisImagePipeline):
    """Edit an image, generated or real, into target prompts, on Ovis-Image.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`; an inversion that is guided is so by the empty prompt. Recordings serve edits of
    words too.
    """

    parent = OvisImagePipeline
    kept_in_loop = "embeddings of negative prompts"
    parts = ("transformer", "vae", "text_encoder")
    told = ("system_prompt", "user_prompt_begin_id")

    def _loop(self, arguments: dict[str, Any]) -> Any:
        # The parent's default is an empty prompt, which it refuses beside embeddings.
        embedded = arguments.get("negative_prompt_embeds") is not None
        return super()._loop({"negative_prompt": None, **arguments} if embedded else arguments)


class FreePromptLongCatImagePipeline(FlowEditing, LongCatImagePipeline):
    """Edit an image, generated or real, into target prompts, on LongCat-Image.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`, with what the pipeline of diffusers lacks: ``max_sequence_length``, by default its
    ``tokenizer_max_length``, and ``callback_on_step_end``, which is given latents. Prompts are encoded as they are
    given: ``pipe.rewire_prompt(prompts, device)`` rewrites them first, as diffusers' pipeline does unasked. An
    inversion that is guided is so by the empty prompt. Recordings serve edits of words too.
    """

    parent = LongCatImagePipeline
    kept_in_loop = "text embeddings"
    parts = ("transformer", "vae", "text_encoder")
    told = ("prompt_template_encode_prefix", "prompt_template_encode_suffix", "tokenizer_max_length")
    # It is for rewriting prompts alone.
    _optional_components: ClassVar = [*LongCatImagePipeline._optional_components, "text_processor"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    @classmethod
    def parent_options(cls) -> frozenset[str]:
        """The arguments of a call in diffusers, and those that are made up here."""
        made_up = {"callback_on_step_end", "callback_on_step_end_tensor_inputs", "max_sequence_length"}
        return super().parent_options() | made_up

    def _loop(self, arguments: dict[str, Any]) -> Any:
        told = dict(arguments)
        if told.setdefault("enable_prompt_rewrite", False):
            raise ValueError(
                "enable_prompt_rewrite=True gives the model other prompts than an edit, an inversion or a recording is "
                "told of: rewrite them by pipe.rewire_prompt(prompts, device), and pass what it makes of them"
            )
        embedded = [name for name in ("prompt_embeds", "negative_prompt_embeds") if told.get(name) is not None]
        if embedded:
            raise ValueError(
                f"{self.parent.__name__} counts its rows by prompts, which {embedded[0]} does not go with: pass "
                "prompts, and negative ones"
            )
        if told.get("negative_prompt") is None:  # of None the parent makes one for all rows, which it cannot take
            told["negative_prompt"] = [""] * len(told["prompt"])
        callback = told.pop("callback_on_step_end", None)
        given = told_of_steps(self, callback, told.pop("callback_on_step_end_tensor_inputs", ["latents"]))
        with given, reading(self, told.pop("max_sequence_length", None)):
            return super()._loop(told)


class FreePromptBriaPipeline(FlowEditing, BriaPipeline):
    """Edit an image, generated or real, into target prompts, on Bria 3.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`; an inversion that is guided is so by zeros, which stand for no negative prompt.
    Recordings serve edits of words too.
    """

    parent = BriaPipeline
    parts = ("transformer", "vae", "text_encoder")

    def _check_source_can_be_dropped(self, call: Call, options: Mapping[str, Any]) -> None:
        super()._check_source_can_be_dropped(call, options)
        if options.get("normalize"):
            raise ValueError(
                "keep_source=False would change what normalize=True scales by, which is the spread of all rows: use "
                "keep_source=True, or leave normalize out"
            )

    def _loop(self, arguments: dict[str, Any]) -> Any:
        negative = arguments.get("negative_prompt") or [""]
        if not negative[0] and any(negative):
            raise ValueError(
                f"{self.parent.__name__} takes no negative prompt at all where the first one, the source's, is empty, "
                f"got {negative}: give the source one too, or leave out all of them"
            )
        return super()._loop(arguments)
