"""Prompt-to-Prompt's ``seq_aligner``: which tokens of the source prompt stand for which of a target's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ...prompts.alignment import Alignment, align_refine, align_replace
from ...prompts.words import TokenizedPrompt, tokenize
from ..given import number
from ..names import unknown_name
from ..switch import chosen_compat

__all__ = [
    "get_mapper",
    "get_refinement_mapper",
    "get_replacement_mapper",
    "get_replacement_mapper_",
    "get_word_inds",
]

Compat = Literal["original"] | None

__getattr__ = unknown_name(
    __name__,
    "Prompt-to-Prompt's seq_aligner",
    __all__,
    dict.fromkeys(
        ("ScoreParams", "global_align", "get_matrix", "get_traceback_matrix", "get_aligned_sequences"),
        "it is a step of get_mapper, which is computed another way",
    ),
)


def get_mapper(
    x: str, y: str, tokenizer: Any, max_len: int = 77, compat: Compat = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token of ``y``, the position in ``x`` whose column it takes, and whether it takes one.

    Args:
        x, y: source and target prompt.
        tokenizer: the pipeline's.
        max_len: tokens after padding.
        compat: ``"original"`` aligns tokens as the authors' code does; default: words, their padding moved with them.

    Returns:
        mapper [max_len], int64, -1 where the token keeps its own column; alphas [max_len], float32, 0 there and else 1.
    """
    alignment = align_refine(*_tokenized(x, y, tokenizer, max_len), chosen_compat(compat))
    mapper = torch.where(alignment.kept > 0, alignment.mapper.argmax(0), -1)
    return mapper, alignment.kept.float()


def get_refinement_mapper(
    prompts: Sequence[str], tokenizer: Any, max_len: int = 77, compat: Compat = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`get_mapper` of each target of ``prompts[0]``: [targets, max_len] both."""
    mappers, alphas = zip(
        *(get_mapper(prompts[0], target, tokenizer, max_len, compat) for target in prompts[1:]), strict=True
    )
    return torch.stack(mappers), torch.stack(alphas)


def get_replacement_mapper_(x: str, y: str, tokenizer: Any, max_len: int = 77, compat: Compat = None) -> torch.Tensor:
    """The matrix [max_len, max_len], float32, that takes columns of ``x``'s map to those of ``y``'s, word for word.

    Args:
        x, y, tokenizer, max_len: as of :func:`get_mapper`.
        compat: ``"original"`` leaves the tokens after the last replaced word where they are, whatever its length.

    Raises:
        ValueError: prompts of different numbers of words.
    """
    return align_replace(*_tokenized(x, y, tokenizer, max_len), chosen_compat(compat)).mapper.float()


def get_replacement_mapper(
    prompts: Sequence[str], tokenizer: Any, max_len: int = 77, compat: Compat = None
) -> torch.Tensor:
    """:func:`get_replacement_mapper_` of each target of ``prompts[0]``: [targets, max_len, max_len]."""
    return torch.stack(
        [get_replacement_mapper_(prompts[0], target, tokenizer, max_len, compat) for target in prompts[1:]]
    )


def get_word_inds(text: str, word_place: int | str | Sequence[int], tokenizer: Any) -> np.ndarray:
    """Positions of the tokens of a word, which stands between blanks; empty where the text has none such.

    Args:
        text: a prompt.
        word_place: the word, or its number, or several.
        tokenizer: the pipeline's.

    Raises:
        ValueError: numbers that are none of a word of the text.
    """
    words = tokenize(text, tokenizer).spaced_words
    if isinstance(word_place, str):
        chosen = [word for word in words if word.text == word_place]
    else:
        places = [word_place] if not isinstance(word_place, Iterable) else word_place
        numbered = [number("word_place", place) for place in places]
        if not all(-len(words) <= place < len(words) for place in numbered):
            raise ValueError(f"word_place: expected numbers of the {len(words)} words of {text!r}, got {word_place!r}")
        chosen = [words[place] for place in numbered]
    return np.array([token for word in chosen for token in word.tokens], dtype=np.int64)


def refinement_matrices(prompts: Sequence[str], tokenizer: Any, compat: Compat) -> tuple[torch.Tensor, torch.Tensor]:
    """What the source's map is multiplied with [targets, M, M], and each column's share of it [targets, M].

    As :func:`get_refinement_mapper`, with words of several tokens shared among those in their place.
    """
    alignments = _alignments(align_refine, prompts, tokenizer, compat)
    return torch.stack([one.mapper for one in alignments]), torch.stack([one.kept for one in alignments])


def _alignments(align: Any, prompts: Sequence[str], tokenizer: Any, compat: Compat) -> list[Alignment]:
    source, *targets = (tokenize(prompt, tokenizer) for prompt in prompts)
    return [align(source, target, compat) for target in targets]


def _tokenized(x: str, y: str, tokenizer: Any, max_len: int) -> tuple[TokenizedPrompt, TokenizedPrompt]:
    tokenized = tokenize(x, tokenizer), tokenize(y, tokenizer)
    if any(prompt.length != max_len for prompt in tokenized):
        raise ValueError(
            f"max_len={max_len}, and the tokenizer pads prompts to {tokenized[0].length} tokens: pass that"
        )
    return tokenized
