"""Which tokens of one prompt stand for which tokens of another: the mappers of Prompt-to-Prompt."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .words import TokenizedPrompt, Word, tokenize

__all__ = ["Alignment", "TokenizedPrompt", "Word", "align_refine", "align_replace", "tokenize"]


@dataclass(frozen=True)
class Alignment:
    """How a target prompt takes its tokens' columns from a source prompt's map: ``A_source @ mapper``.

    Args:
        mapper: [source tokens, target tokens], float64.
        kept: [target tokens], float64: 1 where the column is the source's, 0 where the target keeps its own.
    """

    mapper: torch.Tensor
    kept: torch.Tensor


def align_replace(source: TokenizedPrompt, target: TokenizedPrompt, compat: str | None = None) -> Alignment:
    """Word for word, for prompts of equally many words: "a red car" to "a blue car".

    A word's tokens share what the tokens of the word in its place have, so that every row of the mapper sums to 1
    and the rows of the replaced map do too. Tokens after a word that changed its number of tokens move with it.

    Args:
        compat: ``"original"`` for the mapper of Prompt-to-Prompt's code, which splits words at blanks only and,
            after the last replaced word, leaves tokens where they are although the words have moved.

    Raises:
        ValueError: different numbers of words, or of tokens after padding.
    """
    _check_lengths(source, target)
    ours, theirs = (source.words, target.words) if compat is None else (source.spaced_words, target.spaced_words)
    if len(ours) != len(theirs):
        raise ValueError(
            f'align="replace" pairs words by their place and needs equally many: {source.text!r} has {len(ours)}, '
            f'{target.text!r} has {len(theirs)}; use align="refine" for words that are added or left out'
        )
    mapper = torch.zeros(source.length, target.length, dtype=torch.float64)
    if compat is not None:
        _fill_as_original(mapper, [(a.tokens, b.tokens) for a, b in zip(ours, theirs, strict=True) if a.text != b.text])
    else:
        for before, after in zip(ours, theirs, strict=True):
            _share(mapper, before.tokens, after.tokens)
        _pair_rest(mapper, source, target)
        lost = mapper.sum(1) == 0  # padding that the target has less of, and words that it was truncated before
        mapper[lost, 0 if target.first and not target.after else (target.attended or target.length) - 1] = 1.0
    return Alignment(mapper, torch.ones(target.length, dtype=torch.float64))


def align_refine(source: TokenizedPrompt, target: TokenizedPrompt, compat: str | None = None) -> Alignment:
    """Words that both prompts have, in order, take the source's columns; words of the target alone keep their own.

    Args:
        compat: ``"original"`` for the mapper of Prompt-to-Prompt's code, which aligns tokens rather than words and
            leaves padding where it is.

    Raises:
        ValueError: the prompts have no word in common, or different numbers of tokens after padding.
    """
    _check_lengths(source, target)
    mapper = torch.zeros(source.length, target.length, dtype=torch.float64)
    if compat is None:
        ours, theirs = source.words, target.words
    else:
        ours, theirs = _tokens_as_words(source), _tokens_as_words(target)
    pairs = _longest_common(
        [_spelling(word) for word in ours], [_spelling(word) for word in theirs], late=compat is not None
    )
    if not pairs:
        raise ValueError(
            f"{target.text!r} shares no word with {source.text!r}: there is nothing to refine; repeat the words that "
            'are to keep their place, or use align="replace" or FreePromptEdit'
        )
    for first, second in pairs:
        _share(mapper, ours[first].tokens, theirs[second].tokens)
    if compat is None:
        _pair_rest(mapper, source, target)
    else:
        _share(mapper, *(tuple(p.first + i for i, s in enumerate(p.spans) if s is None) for p in (source, target)))
        padding = [*target.before, *target.after]
        mapper[padding, padding] = 1.0
    return Alignment(mapper, (mapper.sum(0) > 0).double())


def _spelling(word: Word) -> str:
    return unicodedata.normalize("NFC", word.text.casefold())


def _check_lengths(source: TokenizedPrompt, target: TokenizedPrompt) -> None:
    if source.length != target.length:
        raise ValueError(f"the prompts are padded to {source.length} and {target.length} tokens: use one tokenizer")


def _share(mapper: torch.Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """Tokens that stand for one another: one to one, or each of the first shared evenly among the second."""
    if len(before) == len(after):
        mapper[list(before), list(after)] = 1.0
        return
    for token in before:
        mapper[token, list(after)] = 1.0 / max(len(after), 1)


def _pair_rest(mapper: torch.Tensor, source: TokenizedPrompt, target: TokenizedPrompt) -> None:
    """Start and end tokens, then what is around the prompts, which counts from each prompt's beginning and end."""
    for which in (0, -1):
        if source.spans and target.spans and source.spans[which] is None and target.spans[which] is None:
            mapper[source.first + which % len(source.spans), target.first + which % len(target.spans)] = 1.0
    for ours, theirs in ((source.after, target.after), (source.before, target.before)):
        count = min(len(ours), len(theirs))
        mapper[list(ours[:count]), list(theirs[:count])] = 1.0


def _fill_as_original(mapper: torch.Tensor, changed: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    row = column = 0
    for before, after in changed:
        if not before or not after:  # truncated
            continue
        while row < before[0]:
            mapper[row, column] = 1.0
            row, column = row + 1, column + 1
        _share(mapper, before, after)
        row, column = row + len(before), column + len(after)
    tail = torch.arange(column, column + mapper.shape[0] - max(row, column))
    mapper[tail, tail] = 1.0


def _tokens_as_words(prompt: TokenizedPrompt) -> tuple[Word, ...]:
    return tuple(
        Word(prompt.text[span[0] : span[1]], (prompt.first + index,))
        for index, span in enumerate(prompt.spans)
        if span is not None
    )


def _longest_common(first: Sequence[str], second: Sequence[str], late: bool = False) -> list[tuple[int, int]]:
    """Index pairs of a longest common subsequence.

    Where several are longest, the one whose matches come earliest; or, as the original traces back, ``late`` in
    ``first`` and early in ``second``.
    """
    rows, columns = len(first), len(second)
    best = [[0] * (columns + 1) for _ in range(rows + 1)]
    pairs = []
    if late:
        for i in range(rows):
            for j in range(columns):
                matched = best[i][j] + 1 if first[i] == second[j] else 0
                best[i + 1][j + 1] = max(matched, best[i][j + 1], best[i + 1][j])
        i, j = rows, columns
        while i and j:
            if best[i][j] == best[i][j - 1]:
                j -= 1
            elif best[i][j] == best[i - 1][j]:
                i -= 1
            else:
                i, j = i - 1, j - 1
                pairs.append((i, j))
        return pairs[::-1]
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            matched = best[i + 1][j + 1] + 1 if first[i] == second[j] else 0
            best[i][j] = max(matched, best[i + 1][j], best[i][j + 1])
    i = j = 0
    while i < rows and j < columns:
        if first[i] == second[j] and best[i][j] == best[i + 1][j + 1] + 1:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
