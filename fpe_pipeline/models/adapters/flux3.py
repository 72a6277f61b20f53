"""FLUX.3: blocks of image tokens alone and of text tokens alone, then blocks with one sequence of both, text first.

Tokens of reference pictures follow those that are denoised, in the common blocks. Padding of texts is attended to, so
that the texts of a call have one length. Places of image tokens have four coordinates: time, row, column and picture,
the second and third scaled. diffusers calls it from modular pipelines, whose blocks encode one prompt: while a session
follows them they take lists of prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ...shadows import Shadows
from ...text_parts import Template, TextPart, conversation, inner_blocks, plain_tokenizer
from ..sites import Site, dual_and_single
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .once import once_a_tensor
from .padding import warn_of_padding

__all__ = ["Flux3Adapter"]

_PATCH = 2
#: What encodes one prompt, in blocks of diffusers 0.42.
_ENCODES = "_get_qwen3_vl_prompt_embeds"


def _conversation(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    """What a chat template writes around a prompt."""
    return conversation(pipe.tokenizer)


class Flux3Adapter(NamedCallsAdapter):
    """diffusers' ``Flux3Transformer2DModel``."""

    family = "flux3"
    text_parts = (
        TextPart("tokenizer", ("text_encoder",), _conversation, is_padded=True, one_at_a_time=True, keeps_length=True),
    )

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        own = (
            Site(f"mode_blocks.image.{index}.attn", "dual", "image", index, block.attn.heads, 0, (), patch=_PATCH)
            for index, block in enumerate(module.mode_blocks["image"])
        )
        return (*own, *dual_and_single(module, _PATCH))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample, shown = given["hidden_states"], given.get("image_cond_hidden_states")
        height, width = _grid(given["img_ids"])
        if height * width != sample.shape[1]:
            raise ValueError(
                f"the model got {sample.shape[1]} image tokens, whose places are {height} rows and {width} columns: "
                "the grid of the picture that it denoises has to be whole"
            )
        return ModelCall(
            sample,
            given["timestep"],
            (height * _PATCH, width * _PATCH),
            half=self._half(),
            references=0 if shown is None else shown.shape[1],
            arguments=(args, kwargs),
        )

    def follow(self) -> Callable[[], None]:
        """Have blocks that encode prompts take lists of them, too; what is returned ends it."""
        leave = super().follow()
        covered = []
        for block in inner_blocks(self.pipe):
            shadows = Shadows(block)
            if hasattr(block, _ENCODES):
                shadows.cover(_ENCODES, partial(_encoded, self.pipe))
                shadows.cover("check_inputs", _check_prompts)
            elif type(block).__name__.endswith("PromptUpsampleStep"):
                shadows.cover("get_block_state", _checked_request)
            covered.append(shadows)

        def end() -> None:
            for shadows in covered:
                shadows.remove()
            leave()

        return end


def _encoded(pipe: Any, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Embeddings [prompts, tokens, C] of a list of prompts, of as many tokens as the longest one's window has."""
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    prompts = given["prompt"]
    if isinstance(prompts, str):
        return original(*args, **kwargs)
    most, multiple = int(given["max_sequence_length"]), int(given["pad_multiple"])
    template, read = _conversation(pipe, {}), plain_tokenizer(given["tokenizer"])

    def window(prompt: str) -> int:
        count = len(read(template.before + prompt + template.after, truncation=True, max_length=most)["input_ids"])
        return min(-(-count // multiple) * multiple, most)

    windows = [window(prompt) for prompt in prompts]
    warn_of_padding("FLUX.3", windows, max(windows))
    given["pad_multiple"] = max(windows)
    rows = []
    for prompt in prompts:
        given["prompt"] = prompt
        rows.append(original(*bound.args, **bound.kwargs))
    return torch.cat(rows)


def _check_prompts(original: Callable[[Any], None], state: Any) -> None:
    """What a block checks, of each of its prompts; ValueError for lists that do not go together."""
    prompts, negative = state.prompt, getattr(state, "negative_prompt", None)
    if isinstance(prompts, str):
        original(state)
        return
    if not isinstance(prompts, list):
        raise ValueError(f"prompt must be a text or a list of them, got {type(prompts).__name__}")
    for name, texts in (("prompt", prompts), ("negative_prompt", negative)):
        if isinstance(texts, list) and not (texts and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"{name} must be texts, or a list of them, got {texts!r}")
    if isinstance(negative, list) and len(negative) != len(prompts):
        raise ValueError(
            f"got {len(prompts)} prompts and {len(negative)} negative ones: pass one for all, or as many as prompts"
        )
    if not isinstance(negative, str | list | None):
        raise ValueError(f"negative_prompt must be a text or a list of them, got {type(negative).__name__}")


def _checked_request(original: Callable[[Any], Any], state: Any) -> Any:
    """What an upsampler of prompts reads; ValueError for several, each of which it would write anew."""
    asked = original(state)
    if isinstance(asked.prompt, list):
        raise ValueError(
            "the prompt upsampler writes a caption of its own for each prompt, so that a source and its targets would "
            f"differ in more than the edit; got {len(asked.prompt)} prompts: take the step out "
            '(blocks.sub_blocks.pop("prompt_upsampler") before blocks.init_pipeline), and pass captions as prompts'
        )
    return asked


@once_a_tensor
def _grid(places: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of image tokens, from their places [N, 4]: (time, row, column, picture)."""
    return len(places[:, 1].unique()), len(places[:, 2].unique())
