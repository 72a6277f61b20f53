"""Which tokens of one prompt stand for which tokens of another: the mappers of Prompt-to-Prompt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Alignment", "TokenizedPrompt", "Word", "align_refine", "align_replace", "tokenize"]

_SPACED = re.compile(r"\S+")
# Scripts that put no blanks between words (Thai, Lao, Tibetan, Burmese, Khmer, Chinese, Japanese), or write particles
# onto them (Korean): a word is found there inside a longer run of letters.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Word:
    """A word of a prompt and the positions of its tokens; none where the prompt was truncated before it."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the text encoder sees it.

    Args:
        text: the prompt.
        spans: for each token, its (start, stop) in the text; None for tokens that stand for no text (start, end).
        length: tokens after padding: the number of keys of cross-attention.
    """

    text: str
    spans: tuple[tuple[int, int] | None, ...]
    length: int

    @property
    def words(self) -> tuple[Word, ...]:
        """Words and punctuation marks, each with its tokens; every token that stands for text is in one of them."""
        return self._split(_word_pattern(self.text))

    @property
    def spaced_words(self) -> tuple[Word, ...]:
        """What stands between blanks, punctuation included: the words of the original Prompt-to-Prompt."""
        return self._split(_SPACED)

    def find(self, phrase: str) -> tuple[int, ...]:
        """Positions of the tokens of a word or phrase, wherever it occurs.

        Letter case does not matter, nor whether accents are characters of their own.

        Raises:
            ValueError: the prompt does not contain it as whole words, or was truncated before it.
        """
        phrase = phrase.strip()
        found = _occurrences(phrase, self.text)
        tokens = tuple(i for i, span in enumerate(self.spans) if any(_overlap(span, other) for other in found))
        if not found:
            raise ValueError(f"the word {phrase!r} is not in the prompt {self.text!r}; its words are {self._listed()}")
        if not tokens:
            raise ValueError(f"the word {phrase!r} is past the {self.length} tokens that are kept of {self.text!r}")
        return tokens

    def contains(self, phrase: str) -> bool:
        """Whether :meth:`find` finds it."""
        return bool(_occurrences(phrase.strip(), self.text))

    def _split(self, pattern: re.Pattern[str]) -> tuple[Word, ...]:
        matches = list(pattern.finditer(self.text))
        tokens: list[list[int]] = [[] for _ in matches]
        for index, span in enumerate(self.spans):
            if span is not None and matches:
                # A token of blanks alone goes with the word that follows.
                owner = next((n for n, m in enumerate(matches) if m.end() > span[0]), len(matches) - 1)
                tokens[owner].append(index)
        return tuple(Word(match.group(), tuple(given)) for match, given in zip(matches, tokens, strict=True))

    def _listed(self) -> str:
        return ", ".join(repr(word.text) for word in self.words) or "none"


@dataclass(frozen=True)
class Alignment:
    """How a target prompt takes its tokens' columns from a source prompt's map: ``A_source @ mapper``.

    Args:
        mapper: [source tokens, target tokens], float64.
        kept: [target tokens], float64: 1 where the column is the source's, 0 where the target keeps its own.
    """

    mapper: torch.Tensor
    kept: torch.Tensor


def tokenize(prompt: str, tokenizer: Any, length: int | None = None) -> TokenizedPrompt:
    """Tokens of a prompt and where they are in its text, with any Hugging Face tokenizer.

    Args:
        prompt: the text.
        tokenizer: a pipeline's ``tokenizer``. Without offsets (slow tokenizers), tokens are located by decoding
            them one after the other.
        length: tokens after padding. Default: ``tokenizer.model_max_length``, as pipelines pad.

    Raises:
        TypeError: no tokenizer.
    """
    if not callable(tokenizer):
        raise TypeError(
            f"expected a tokenizer to find words with, such as pipe.tokenizer, got {type(tokenizer).__name__}"
        )
    if length is None:
        length = int(tokenizer.model_max_length)
        if length > 1_000_000:  # transformers' "unlimited"
            raise ValueError(f"{type(tokenizer).__name__} states no maximal length: pass length=, the encoder's tokens")
    arguments = {"truncation": True, "max_length": length}
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(prompt, return_offsets_mapping=True, return_special_tokens_mask=True, **arguments)
        spans: list[tuple[int, int] | None] = [
            None if special else (int(start), int(stop))
            for (start, stop), special in zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
        ]
    else:
        spans = _spans_by_decoding(prompt, tokenizer, tokenizer(prompt, **arguments)["input_ids"])
    return TokenizedPrompt(prompt, tuple(spans), length)


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
        mapper[lost, -1] = 1.0
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
        _share(mapper, *(tuple(i for i, span in enumerate(p.spans) if span is None) for p in (source, target)))
        padding = torch.arange(len(target.spans), target.length)
        mapper[padding, padding] = 1.0
    return Alignment(mapper, (mapper.sum(0) > 0).double())


def _word_pattern(text: str) -> re.Pattern[str]:
    """A run of letters and digits of ``text``, with apostrophes and hyphens inside, or a single punctuation mark."""
    # Combining marks (accents of their own, vowel signs) belong to the letter before; `re` has no class of them.
    letter = rf"[\w{''.join(sorted({character for character in text if _is_mark(character)}))}]"
    return re.compile(rf"{letter}+(?:['’-]{letter}+)*|[^\w\s]")


def _occurrences(phrase: str, text: str) -> list[tuple[int, int]]:
    """Where a phrase stands in a text as whole words, as (start, stop)."""
    if not phrase:
        return []
    composed, places = _composed(text)
    body = r"\s+".join(re.escape(part) for part in _composed(phrase)[0].split())
    spans = (match.span(1) for match in re.finditer(f"(?=({body}))", composed, re.IGNORECASE))
    return [
        (places[start], places[stop])
        for start, stop in spans
        if not _is_inside_a_word(composed, start) and not _is_inside_a_word(composed, stop)
    ]


def _composed(text: str) -> tuple[str, list[int]]:
    """A text with accents composed (NFC), and for each of its characters, and its end, the place in ``text``."""
    composed: list[str] = []
    places: list[int] = []
    start = 0
    for stop in range(1, len(text) + 1):
        if stop == len(text) or not _is_mark(text[stop]):  # a letter with its marks has ended
            letter = unicodedata.normalize("NFC", text[start:stop])
            composed.append(letter)
            places += [start] * len(letter)
            start = stop
    return "".join(composed), [*places, len(text)]


def _is_inside_a_word(text: str, place: int) -> bool:
    """Whether a cut before the character at ``place`` would divide a word."""
    if not 0 < place < len(text):
        return False
    before, after = text[place - 1], text[place]
    return _is_mark(after) or (_is_spaced_letter(before) and _is_spaced_letter(after))


def _is_spaced_letter(character: str) -> bool:
    """Whether it spells words, in a script that puts blanks between them."""
    spells = character.isalnum() or character == "_" or _is_mark(character)
    return spells and _UNSPACED.match(character) is None


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _spelling(word: Word) -> str:
    return unicodedata.normalize("NFC", word.text.casefold())


def _overlap(span: tuple[int, int] | None, other: tuple[int, int]) -> bool:
    return span is not None and span[0] < other[1] and other[0] < span[1]


def _spans_by_decoding(prompt: str, tokenizer: Any, ids: Sequence[int]) -> list[tuple[int, int] | None]:
    text, cursor = prompt.lower(), 0
    special = set(tokenizer.all_special_ids)
    spans: list[tuple[int, int] | None] = []
    for position, token in enumerate(ids):
        # An unknown token in the middle is special too, but stands for text.
        if token in special and position in (0, len(ids) - 1):
            spans.append(None)
            continue
        piece = tokenizer.decode([token]).strip().strip("#").lower()
        start = text.find(piece, cursor) if piece else -1
        if start < 0:  # a piece of a character: it belongs to where the cursor is
            start = cursor + len(text[cursor:]) - len(text[cursor:].lstrip())
            spans.append((start, min(start + 1, len(text))))
        else:
            cursor = start + len(piece)
            spans.append((start, cursor))
    return spans


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
    """Start and end tokens, then the padding, which counts from each prompt's end."""
    for which in (0, -1):
        if source.spans and target.spans and source.spans[which] is None and target.spans[which] is None:
            mapper[which % len(source.spans), which % len(target.spans)] = 1.0
    first, second = len(source.spans), len(target.spans)
    padding = torch.arange(min(source.length - first, target.length - second))
    mapper[first + padding, second + padding] = 1.0


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
        Word(prompt.text[span[0] : span[1]], (index,)) for index, span in enumerate(prompt.spans) if span is not None
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
