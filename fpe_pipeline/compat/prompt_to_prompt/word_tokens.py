"""Tokens of words in prompts, which steps replace them, and factors for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ...errors import check_positive
from ...models.steps import StepWindow
from ...prompts.words import tokenize
from ..given import factor, number, window
from ..switch import chosen_compat
from .seq_aligner import get_word_inds

__all__ = ["Compat", "WordFactors", "get_equalizer", "get_time_words_attention_alpha", "update_alpha_time_word"]

Compat = Literal["original"] | None


def required(tokenizer: Any) -> Any:
    """The tokenizer; RuntimeError where there is none yet."""
    if tokenizer is None:
        raise RuntimeError(
            "words are found with the pipeline's tokenizer, which is known once the controller is registered: call "
            "register_attention_control(pipe, controller) first, or pass tokenizer=pipe.tokenizer"
        )
    return tokenizer


def tokens_of_words(prompt: str, words: Sequence[str], tokenizer: Any, compat: Compat) -> tuple[int, list[list[int]]]:
    """The tokens of a padded prompt, and for each word the positions of its tokens.

    Raises:
        ValueError: a word that is not in the prompt; with compat="original" it has no token.
    """
    tokenized = tokenize(prompt, required(tokenizer))
    found = []
    for word in words:
        tokens = get_word_inds(prompt, word, tokenizer).tolist()
        found.append(tokens if tokens or compat == "original" else list(tokenized.find(word)))
    return tokenized.length, found


@dataclass(frozen=True)
class WordFactors:
    """A factor for each of some words of a text, which become a tensor once there is a tokenizer.

    Args:
        text: a prompt.
        words: of it.
        values: one for all, one a word, or for a single word several, a target each.
    """

    text: str
    words: tuple[str | int, ...]
    values: tuple[float, ...]

    def tensor(self, tokenizer: Any, compat: Compat = None) -> torch.Tensor:
        """[1 | targets, M], 1 for all other tokens."""
        named = [word for word in self.words if isinstance(word, str)]
        length, _ = tokens_of_words(self.text, [], tokenizer, compat)
        _, of_names = tokens_of_words(self.text, named, tokenizer, compat)
        by_name = dict(zip(named, of_names, strict=True))
        tokens = [
            by_name[word] if isinstance(word, str) else get_word_inds(self.text, word, tokenizer).tolist()
            for word in self.words
        ]
        values = self.values * len(self.words) if len(self.values) == 1 else self.values
        if len(values) == len(tokens):
            equalizer = torch.ones(1, length)
            for places, value in zip(tokens, values, strict=True):
                equalizer[:, places] = value
            return equalizer
        if len(tokens) != 1:
            raise ValueError(f"{len(values)} factors for the {len(tokens)} words {self.words}: give one a word")
        equalizer = torch.ones(len(values), length)
        equalizer[:, tokens[0]] = torch.tensor(values)[:, None]
        return equalizer


def get_equalizer(
    text: str,
    word_select: int | str | Sequence[int | str],
    values: float | Sequence[float],
    tokenizer: Any = None,
    compat: Compat = None,
) -> torch.Tensor | WordFactors:
    """Factors for words of ``text``: [1 | targets, M], 1 for all other tokens.

    Args:
        text: the target prompt.
        word_select: words of it, or their numbers.
        values: one for all of them, also without a list, one a word, or for a single word several, a target each.
        tokenizer: the pipeline's; without it the factors wait for the controller that takes them to be registered.
        compat: ``"original"`` takes no notice of words that are not in the text.

    Raises:
        ValueError: no word or no value, another number of values than of words, values that are no finite numbers, a
            word, or a number of one, that the text has not.
    """
    chosen = word_select.tolist() if hasattr(word_select, "tolist") else word_select
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        chosen = (chosen,)
    words = tuple(word if isinstance(word, str) else number("word_select", word) for word in chosen)
    given = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(given, str) or not isinstance(given, Iterable):
        given = (given,)
    factors = WordFactors(text, words, tuple(factor("values", value) for value in given))
    if not words or not factors.values:
        raise ValueError(f"expected words and a factor for them, got word_select={word_select!r} and values={values!r}")
    return factors if tokenizer is None else factors.tensor(tokenizer, chosen_compat(compat))


def update_alpha_time_word(
    alpha: torch.Tensor, bounds: float | tuple[float, float] | StepWindow, prompt_ind: int, word_inds: Any = None
) -> torch.Tensor:
    """Let tokens of a target be the source's in a window of the steps alone, in place.

    Args:
        alpha: [steps + 1, targets, M].
        bounds: shares of ``alpha``'s rows, the window's begin and end, or its end.
        prompt_ind: the target's number, from 0 on.
        word_inds: the tokens; default: all.

    Raises:
        ValueError: bounds that are no shares, from 0 to 1.
    """
    replaced = window("bounds", bounds).steps(alpha.shape[0])
    tokens = torch.arange(alpha.shape[2]) if word_inds is None else torch.as_tensor(np.asarray(word_inds)).long()
    alpha[:, prompt_ind, tokens] = 0
    alpha[replaced.start : replaced.stop, prompt_ind, tokens] = 1
    return alpha


def cross_windows(cross_replace_steps: Any) -> dict[str, StepWindow]:
    """By word, and "default_" for the others, the windows that ``cross_replace_steps`` says.

    Raises:
        ValueError: one that is no share of the steps, and no begin and end.
    """
    if not isinstance(cross_replace_steps, dict):
        return {"default_": window("cross_replace_steps", cross_replace_steps)}
    return {word: window(f"cross_replace_steps[{word!r}]", value) for word, value in cross_replace_steps.items()}


def get_time_words_attention_alpha(
    prompts: Sequence[str],
    num_steps: int,
    cross_replace_steps: Any,
    tokenizer: Any,
    max_num_words: int = 77,
    compat: Compat = None,
) -> torch.Tensor:
    """[steps + 1, targets, 1, 1, M]: 1 where a token's column is the source's at a step.

    Args:
        prompts: the source prompt and its targets.
        num_steps: of the run.
        cross_replace_steps: a share of the steps, or a begin and an end; or either by word, and "default_" for others.
        tokenizer: the pipeline's.
        max_num_words: tokens after padding, M.
        compat: ``"original"`` takes no notice of words that are in no target.

    Raises:
        ValueError: a number of steps that is none, shares outside of 0 to 1, or a word that is in no target.
    """
    compat = chosen_compat(compat)
    check_positive(num_steps=num_steps)
    windows = cross_windows(cross_replace_steps)
    default = windows.pop("default_", StepWindow(0.0, 1.0))
    alpha = torch.zeros(num_steps + 1, len(prompts) - 1, max_num_words)
    for target in range(len(prompts) - 1):
        update_alpha_time_word(alpha, default, target)
    for word, replaced in windows.items():
        found = [get_word_inds(prompt, word, tokenizer) for prompt in prompts[1:]]
        if not any(len(tokens) for tokens in found) and compat != "original":
            raise ValueError(f"the word {word!r} of cross_replace_steps is in none of the targets {list(prompts[1:])}")
        for target, tokens in enumerate(found):
            if len(tokens):
                update_alpha_time_word(alpha, replaced, target, tokens)
    return alpha[:, :, None, None]
