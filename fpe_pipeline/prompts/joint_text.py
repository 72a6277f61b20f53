"""Text tokens of joint attention: what several tokenizers made of a prompt, one after the other in one sequence.

Stable Diffusion 3 joins the tokens of CLIP and of T5, so that a word stands there twice; FLUX.1 has those of T5 alone.
Qwen-Image, Lumina 2 and Z-Image encode a prompt inside a text of their own, of which some tokens may be dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..text_parts import Template
from .alignment import Alignment
from .encoding import EncodedText, Encoding
from .words import TokenizedPrompt, short_form, tokenize

__all__ = ["JointPrompt", "aligned", "encoded_prompts"]

#: Tokens that no template and prompt have.
_ENDLESS = 1 << 20

Align = Callable[[TokenizedPrompt, TokenizedPrompt, str | None], Alignment]


@dataclass(frozen=True)
class JointPrompt:
    """A prompt as the text tokens of joint attention.

    Args:
        text: the prompt.
        parts: what each tokenizer made of it, or, where no encoder reads it, the number of tokens that stand there.
    """

    text: str
    parts: tuple[TokenizedPrompt | int, ...]

    @property
    def length(self) -> int:
        """Text tokens in all."""
        return sum(map(_length, self.parts))

    def find(self, phrase: str) -> tuple[int, ...]:
        """Positions of the tokens of a word or phrase, in every part.

        Raises:
            ValueError: the prompt does not contain it as whole words, or every part was truncated before it.
        """
        found: list[int] = []
        start, first = 0, None
        for part in self.parts:
            if isinstance(part, TokenizedPrompt):
                try:
                    found += [start + token for token in part.find(phrase)]
                except ValueError as error:
                    first = first or error
            start += _length(part)
        if not found and first is not None:
            raise first
        return tuple(found)

    def contains(self, phrase: str) -> bool:
        """Whether the prompt has it as whole words."""
        return any(isinstance(part, TokenizedPrompt) and part.contains(phrase) for part in self.parts)


def encoded_prompts(
    encoding: Encoding, prompts: Sequence[TokenizedPrompt]
) -> tuple[TokenizedPrompt | JointPrompt, ...]:
    """A pipeline call's prompts where attention finds their tokens: in cross-attention, or in joint attention.

    Args:
        encoding: of the call.
        prompts: its prompts, by any tokenizer of the pipeline.

    Raises:
        ValueError: an encoder received other tokens, or it is not known which of a model's text tokens are words.
    """
    if not encoding.texts:
        return encoding.placed(prompts)
    if not any(text.inputs for text in encoding.texts):
        raise ValueError(
            "which text tokens of this transformer are which words is not known, as no text encoder of its pipeline "
            "got any: pass prompts and not embeddings, or use an edit that looks for no words, such as "
            "FreePromptEdit, ConsistEdit or MasaCtrlEdit"
        )
    texts = [prompt.text for prompt in prompts]
    parts = [_part(text, texts) for text in encoding.texts]
    return tuple(JointPrompt(text, tuple(part[number] for part in parts)) for number, text in enumerate(texts))


def aligned(
    align: Align, source: TokenizedPrompt | JointPrompt, target: TokenizedPrompt | JointPrompt, compat: str | None
) -> Alignment:
    """An alignment of two prompts, in joint attention of each part with its like."""
    if isinstance(source, TokenizedPrompt) and isinstance(target, TokenizedPrompt):
        return align(source, target, compat)
    assert isinstance(source, JointPrompt) and isinstance(target, JointPrompt)
    pieces = []
    for ours, theirs in zip(source.parts, target.parts, strict=True):
        if isinstance(ours, TokenizedPrompt) and isinstance(theirs, TokenizedPrompt):
            pieces.append(align(ours, theirs, compat))
        else:  # tokens that stand for no text are each other's
            count = _length(ours)
            pieces.append(Alignment(torch.eye(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)))
    mapper = torch.block_diag(*(piece.mapper for piece in pieces))
    return Alignment(mapper, torch.cat([piece.kept for piece in pieces]))


def _part(encoded: EncodedText, texts: Sequence[str]) -> list[TokenizedPrompt] | list[int]:
    if not encoded.inputs:
        return [encoded.length] * len(texts)
    if encoded.has_quotes:
        raise ValueError(
            "prompts quote something, whose tokens this model puts before those of the prompt, so that no word is "
            "found: write prompts without quotation marks, or use an edit that looks for no words, such as "
            "FreePromptEdit, ConsistEdit or MasaCtrlEdit"
        )
    if encoded.template is not None:
        return _templated(encoded.inputs[0], texts, encoded.template, encoded.tokenizer, encoded.multiple)
    placed: list[list[TokenizedPrompt]] = []
    for batches in encoded.inputs:
        length = int(batches[0].shape[-1])
        known = [tokenize(text, encoded.tokenizer, length) for text in texts]
        placed.append(list(Encoding.placed_in(batches, known)))
    if any(other != placed[0] for other in placed[1:]):
        raise ValueError(
            "text encoders that share their tokens receive the words of a prompt at different places: pass one prompt "
            "for all of them (leave prompt_2 and prompt_3 out)"
        )
    behind = encoded.registers
    return [replace(prompt, first=prompt.first + behind, length=prompt.length + behind) for prompt in placed[0]]


def _templated(
    batches: Sequence[torch.Tensor], texts: Sequence[str], template: Template, tokenizer: Any, multiple: int
) -> list[TokenizedPrompt]:
    """Prompts where one of a text encoder's calls received them inside a template; ValueError where none did."""
    first: ValueError | None = None
    for batch in batches:  # the prompts', then the negative prompts'
        if len(batch) == len(texts):
            try:
                return [
                    _within(row, text, template, tokenizer, multiple)
                    for row, text in zip(batch.tolist(), texts, strict=True)
                ]
            except ValueError as error:
                first = first or error
    raise first or ValueError(
        f"expected the text encoder's call of {len(texts)} texts, got calls of {[len(batch) for batch in batches]}, of "
        "which the words cannot be told from their keys"
    )


def _within(row: Sequence[int], text: str, template: Template, tokenizer: Any, multiple: int) -> TokenizedPrompt:
    """A prompt among the tokens that the model receives of it, by the template's text around it.

    A tokenizer may make another token of a prompt's beginning where a text precedes it, so that it is told by its place
    in the whole text and not by its tokens.
    """
    text = text.lower().strip() if template.lowers else text
    prompt = short_form(text, tokenizer)
    whole = tokenize(template.before + text + template.after, tokenizer, _ENDLESS)
    start, stop = len(template.before), len(template.before) + len(prompt)
    dropped = template.dropped
    if template.shows:  # what follows the pictures is told by its distance from the end
        dropped = len(whole.spans) - sum(token >= 0 for token in row)
    dropped -= next((place for place, token in enumerate(row) if token >= 0), 0)  # behind padding
    own = [
        (place - dropped, (max(span[0], start) - start, min(span[1], stop) - start))
        for place, span in enumerate(whole.spans)
        if span is not None and span[0] < stop and span[1] > start
    ]
    own = [(place, span) for place, span in own if 0 <= place < len(row)]  # the others are truncated
    places = [place for place, _ in own]
    ids = tuple(whole.ids[place + dropped] for place in places)
    if not own or tuple(row[places[0] : places[-1] + 1]) != ids:
        raise ValueError(
            f"the pipeline encodes other tokens than those of the prompt {text!r} in its template, so that its words "
            "cannot be told from its keys: was it changed on the way, or tokenized by another tokenizer?"
        )
    added = tuple(token for token in whole.added if token in prompt)
    count = sum(token >= 0 for token in row)  # filled up by itself, whatever the longest text of the batch is
    attended = 0 if multiple == 1 else -(-count // multiple) * multiple
    return TokenizedPrompt(prompt, tuple(span for _, span in own), len(row), places[0], ids, added, attended)


def _length(part: TokenizedPrompt | int) -> int:
    return part if isinstance(part, int) else part.length
