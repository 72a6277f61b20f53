"""Text tokens of joint attention: what several tokenizers made of a prompt, one after the other in one sequence.

Stable Diffusion 3 joins the tokens of CLIP and of T5, so that a word stands there twice; FLUX.1 has those of T5 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .alignment import Alignment
from .encoding import EncodedText, Encoding
from .words import TokenizedPrompt, tokenize

__all__ = ["JointPrompt", "aligned", "encoded_prompts"]

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
            "which text tokens of this transformer are which words is not known (Qwen-Image encodes prompts inside a "
            "template): use an edit that looks for no words, such as FreePromptEdit, ConsistEdit or MasaCtrlEdit"
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
    return placed[0]


def _length(part: TokenizedPrompt | int) -> int:
    return part if isinstance(part, int) else part.length
