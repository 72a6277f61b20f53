"""Words of a prompt and the positions of their tokens, as a text encoder receives them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..callers import warn
from ..errors import RequestWarning
from ..text_parts import plain_tokenizer

__all__ = ["TokenizedPrompt", "Word", "short_form", "tokenize", "unknown_words", "warn_of_unknown_words"]

#: Tokens that a text encoder of diffusers' pipelines receives at most (Qwen-Image).
_LONGEST = 1024
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
        text: the prompt as users write it; a token of several vectors stands there once.
        spans: for each token, its (start, stop) in the text; None for tokens that stand for no text (start, end).
        length: tokens after padding: the number of keys of cross-attention.
        first: the position of the first of the tokens; before it there is padding, or a template.
        ids: the tokens' numbers in the vocabulary; empty where they are not known.
        added: tokens of the text that were added to the tokenizer (textual inversion): each is one word.
        attended: tokens up to the last one that the model attends to, padding included; 0 for all of ``length``.
    """

    text: str
    spans: tuple[tuple[int, int] | None, ...]
    length: int
    first: int = 0
    ids: tuple[int, ...] = field(default=(), compare=False)
    added: tuple[str, ...] = field(default=(), compare=False)
    attended: int = 0

    @property
    def words(self) -> tuple[Word, ...]:
        """Words and punctuation marks, each with its tokens; every token that stands for text is in one of them."""
        return self._split(_word_pattern(self.text, self.added))

    @property
    def spaced_words(self) -> tuple[Word, ...]:
        """What stands between blanks, punctuation included: the words of the original Prompt-to-Prompt."""
        return self._split(_SPACED)

    @property
    def after(self) -> range:
        """Positions behind the prompt's tokens, nearest first: padding, or the end of a template."""
        return range(self.first + len(self.spans), self.attended or self.length)

    @property
    def before(self) -> range:
        """Positions before the prompt's tokens, nearest first: padding on the left, or the beginning of a template."""
        return range(self.first - 1, -1, -1)

    def find(self, phrase: str) -> tuple[int, ...]:
        """Positions of the tokens of a word or phrase, wherever it occurs.

        Letter case does not matter, nor whether accents are characters of their own.

        Raises:
            ValueError: the prompt does not contain it as whole words, or was truncated before it.
        """
        phrase = phrase.strip()
        found = self._occurrences(phrase)
        tokens = tuple(
            self.first + i for i, span in enumerate(self.spans) if any(_overlap(span, other) for other in found)
        )
        if not found:
            raise ValueError(f"the word {phrase!r} is not in the prompt {self.text!r}; its words are {self._listed()}")
        if not tokens:
            raise ValueError(f"the word {phrase!r} is past the {self.length} tokens that are kept of {self.text!r}")
        return tokens

    def contains(self, phrase: str) -> bool:
        """Whether :meth:`find` finds it."""
        return bool(self._occurrences(phrase.strip()))

    def placed(self, encoded: Sequence[int]) -> TokenizedPrompt:
        """The prompt where a text encoder received it.

        Args:
            encoded: the token numbers of one row of the encoder's input, padding and template included.

        Raises:
            ValueError: the prompt's own tokens are not among them, in their order.
        """
        row = tuple(encoded)
        if len(row) == self.length and row[self.first : self.first + len(self.ids)] == self.ids:
            return self
        begin = int(bool(self.spans) and self.spans[0] is None)
        stop = len(self.spans) - int(len(self.spans) > begin and self.spans[-1] is None)
        own = self.ids[begin:stop]
        places = [place for place in range(len(row) - len(own) + 1) if row[place : place + len(own)] == own]
        if not places or not own:
            raise ValueError(
                f"the pipeline encodes other tokens than those of the prompt {self.text!r}, so that its words cannot "
                "be told from its keys: was it changed on the way, truncated, or tokenized by another tokenizer?"
            )
        return replace(self, spans=self.spans[begin:stop], ids=own, first=places[0], length=len(row))

    def _occurrences(self, phrase: str) -> list[tuple[int, int]]:
        """Where a phrase stands as whole words; an added token is whole, whatever it is spelled from."""
        whole = [m.span() for m in re.finditer(_alternatives(self.added), self.text)] if self.added else []
        return [
            (start, stop)
            for start, stop in _occurrences(phrase, self.text)
            if all(stop <= a or b <= start or (start <= a and b <= stop) for a, b in whole)
        ]

    def _split(self, pattern: re.Pattern[str]) -> tuple[Word, ...]:
        matches = list(pattern.finditer(self.text))
        tokens: list[list[int]] = [[] for _ in matches]
        for index, span in enumerate(self.spans):
            if span is not None and matches:
                # A token of blanks alone goes with the word that follows.
                owner = next((n for n, m in enumerate(matches) if m.end() > span[0]), len(matches) - 1)
                tokens[owner].append(self.first + index)
        return tuple(Word(match.group(), tuple(given)) for match, given in zip(matches, tokens, strict=True))

    def _listed(self) -> str:
        return ", ".join(repr(word.text) for word in self.words) or "none"


def tokenize(prompt: str, tokenizer: Any, length: int | None = None) -> TokenizedPrompt:
    """Tokens of a prompt and where they are in its text, with any Hugging Face tokenizer.

    Tokens of several vectors (textual inversion: ``<toy>``, ``<toy>_1``, …) are written out as diffusers' pipelines do
    before they tokenize; a prompt in which that was done already is the same prompt.

    Args:
        prompt: the text.
        tokenizer: a pipeline's ``tokenizer``, or the processor that holds one. Without offsets (slow tokenizers),
            tokens are located by decoding them one after the other.
        length: tokens after padding. Default: ``tokenizer.model_max_length``, as pipelines pad; where a tokenizer
            states no limit, or one of a language model, what pipelines take at most.

    Raises:
        TypeError: no tokenizer.
    """
    tokenizer = plain_tokenizer(tokenizer)
    # A pipeline is callable as well, and its own name for the tokenizer is what is meant.
    if not callable(tokenizer) or not hasattr(tokenizer, "model_max_length"):
        raise TypeError(
            f"expected a tokenizer to find words with, such as pipe.tokenizer, got {type(tokenizer).__name__}"
        )
    if length is None:
        length = min(int(tokenizer.model_max_length), _LONGEST)
    vectors = added_vectors(tokenizer)
    text = short_form(prompt, tokenizer)
    pieces = _pieces(text, vectors)
    written = "".join(piece for piece, _ in pieces)
    arguments = {"truncation": True, "max_length": length}
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(written, return_offsets_mapping=True, return_special_tokens_mask=True, **arguments)
        ids = encoded["input_ids"]
        spans: list[tuple[int, int] | None] = [
            None if special else (int(start), int(stop))
            for (start, stop), special in zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
        ]
    else:
        ids = tokenizer(written, **arguments)["input_ids"]
        spans = _spans_by_decoding(written, tokenizer, ids)
    return TokenizedPrompt(
        text,
        tuple(None if span is None else _in_short_form(span, pieces) for span in spans),
        length,
        length - len(spans) if getattr(tokenizer, "padding_side", "right") == "left" else 0,
        tuple(int(token) for token in ids),
        tuple(token for token in vectors if token in text),
    )


def added_vectors(tokenizer: Any) -> dict[str, tuple[str, ...]]:
    """Tokens that were added to a tokenizer as text, each with the tokens of all its vectors, itself the first."""
    known: Mapping[str, int] = getattr(tokenizer, "added_tokens_encoder", None) or {}
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    further = {f"{token}_{number}" for token in known for number in _count_from_one(known, token)}
    return {
        token: (token, *(f"{token}_{number}" for number in _count_from_one(known, token)))
        for token in known
        if token not in special and token not in further
    }


def short_form(prompt: str, tokenizer: Any) -> str:
    """A prompt with every token of several vectors written once, as users write it."""
    for token, vectors in sorted(added_vectors(tokenizer).items(), key=lambda item: -len(item[0])):
        if len(vectors) > 1:
            prompt = prompt.replace(" ".join(vectors), token)
    return prompt


def unknown_words(prompt: str, tokenizer: Any) -> tuple[str, ...]:
    """Words of a prompt for which a tokenizer has no token, or so many that it all but spells them: more than one for
    every two letters."""
    if not callable(tokenizer):
        return ()
    tokenized = tokenize(prompt, tokenizer)
    unknown = getattr(tokenizer, "unk_token_id", None)
    found = []
    for word in tokenized.words:
        given = [token - tokenized.first for token in word.tokens]
        texts = [tokenized.text[slice(*(tokenized.spans[token] or (0, 0)))] for token in given]
        letters = sum(map(str.isalpha, word.text))
        pieces = sum(not text or any(map(str.isalpha, text)) for text in texts)
        spelled = pieces > 1 and pieces > letters / 2 and word.text not in tokenized.added
        if letters and (spelled or any(tokenized.ids[token] == unknown for token in given)):
            found.append(word.text)
    return tuple(dict.fromkeys(found))


def _word_pattern(text: str, added: tuple[str, ...] = ()) -> re.Pattern[str]:
    """An added token, a run of letters and digits of ``text``, with apostrophes and hyphens inside, or a single
    punctuation mark."""
    # Combining marks (accents of their own, vowel signs) belong to the letter before; `re` has no class of them.
    letter = rf"[\w{''.join(sorted({character for character in text if _is_mark(character)}))}]"
    whole = f"{_alternatives(added)}|" if added else ""
    return re.compile(rf"{whole}{letter}+(?:['’-]{letter}+)*|[^\w\s]")


def _alternatives(tokens: Sequence[str]) -> str:
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))


def _count_from_one(known: Mapping[str, int], token: str) -> range:
    """The numbers n of the further vectors ``token_n`` of a token."""
    stop = 1
    while f"{token}_{stop}" in known:
        stop += 1
    return range(1, stop)


def _pieces(text: str, vectors: Mapping[str, tuple[str, ...]]) -> list[tuple[str, tuple[int, int]]]:
    """A text with every vector written out, in pieces, each with its (start, stop) in the text itself."""
    several = [token for token, all_of_it in vectors.items() if len(all_of_it) > 1]
    pieces, cursor = [], 0
    for match in re.finditer(_alternatives(several), text) if several else ():
        pieces.append((text[cursor : match.start()], (cursor, match.start())))
        pieces.append((" ".join(vectors[match.group()]), match.span()))
        cursor = match.end()
    return [*pieces, (text[cursor:], (cursor, len(text)))]


def _in_short_form(span: tuple[int, int], pieces: Sequence[tuple[str, tuple[int, int]]]) -> tuple[int, int]:
    """A span of the text that was written out, in the text itself."""
    offset = 0
    for piece, (start, stop) in pieces:
        if span[0] < offset + len(piece) or (piece, (start, stop)) == pieces[-1]:
            if len(piece) != stop - start:  # written out: any of its vectors stands for the whole token
                return start, stop
            return span[0] - offset + start, span[1] - offset + start
        offset += len(piece)
    raise AssertionError("a text has at least one piece")


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


def warn_of_unknown_words(prompts: Iterable[str], tokenizer: Any) -> None:
    """Warn of words that a tokenizer has no tokens for, so that a model can hardly have learnt what they mean."""
    for prompt in dict.fromkeys(prompts):
        unknown = unknown_words(prompt, tokenizer)
        if unknown:
            warn(
                f"the model's tokenizer does not know {', '.join(map(repr, unknown))} of {prompt!r}: such words are "
                "spelt letter by letter, and the model has hardly learnt what they mean (`fpe info` lists what the "
                "embedded model draws)",
                RequestWarning,
            )
