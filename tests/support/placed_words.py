"""Where the words of prompts stand among the text tokens of each family, and how those of two prompts are matched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fpe_pipeline.prompts.words import TokenizedPrompt, tokenize
from fpe_pipeline.text_parts import plain_tokenizer

__all__ = ["CLIP", "T5", "columns", "placed"]

CLIP, T5 = 77, 12  # tokens of the texts of Stable Diffusion 3, FLUX.1 and CogVideoX


def columns(model: Any, pipe: Any, align: Any, prompts: Any, number: int) -> Callable[..., torch.Tensor]:
    """A target's block over text keys from its source's and its own, by where its encoders have the words."""
    pairs = list(zip(*(placed(model, pipe, prompts)[which] for which in (0, number)), strict=True))
    pieces = [align(source, target) for source, target in pairs]
    mapper = torch.block_diag(*(piece.mapper for piece in pieces))
    kept = torch.cat([piece.kept for piece in pieces])

    def text(of_source: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        # Keys that a shorter caption does not have at all take no part.
        first, last = of_source.shape[-1], own.shape[-1]
        return of_source @ mapper[:first, :last] * kept[:last] + own * (1 - kept[:last])

    return text


def placed(model: Any, pipe: Any, prompts: Any) -> list[list[TokenizedPrompt]]:
    """For each prompt its tokens as each part of the model's text has them, by counting the template's."""
    if model.family in ("sd3", "flux", "chroma", "cogvideox", "mochi", "motif_video"):
        lengths = (CLIP, T5) if model.family == "sd3" else (24,) if model.family == "motif_video" else (T5,)
        return [[tokenize(prompt, pipe.tokenizer, length) for length in lengths] for prompt in prompts]
    if model.family == "hidream":  # of T5, and of Llama twice
        readers = (pipe.tokenizer_3, pipe.tokenizer_4, pipe.tokenizer_4)
        return [[tokenize(prompt, reader, model.texts(0)) for reader in readers] for prompt in prompts]
    if model.family == "aura":  # behind the model's own tokens
        known = (tokenize(prompt, pipe.tokenizer, T5) for prompt in prompts)
        return [[replace(each, first=model.registers, length=T5 + model.registers)] for each in known]
    if model.family == "cogview4":  # alone, behind padding
        longest = model.texts(max(len(pipe.tokenizer(prompt)["input_ids"]) for prompt in prompts))
        return [[tokenize(prompt, pipe.tokenizer, longest)] for prompt in prompts]
    before, after, dropped = model.template(pipe)
    tokenizer = plain_tokenizer(model.tokenizer(pipe))
    rows = [tokenizer(before + prompt + after)["input_ids"][dropped:] for prompt in prompts]
    # A blank at the end of what stands before belongs to the prompt's first token.
    first = len(tokenizer(before.rstrip(" "))["input_ids"]) - dropped
    longest = model.texts(max(map(len, rows)))
    out = []
    for prompt, row in zip(prompts, rows, strict=True):
        spans, cursor = [], 0
        for token in tokenizer.convert_ids_to_tokens(row)[first:]:
            piece = token.strip("Ġ▁")
            if cursor == len(prompt):
                break
            start = prompt.index(piece, cursor)
            spans.append((start, start + len(piece)))
            cursor = start + len(piece)
        padding = longest - len(row) if tokenizer.padding_side == "left" else 0
        out.append([TokenizedPrompt(prompt, tuple(spans), longest, padding + first)])
    return out
