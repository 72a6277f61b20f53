"""Prompts as the page shows and changes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from ..images.side_by_side import changed_words

__all__ = ["EXAMPLES", "FIRST", "differences", "with_word", "words_of"]

#: Title, source and target of what the embedded model draws well.
EXAMPLES = (
    ("Another colour", "a photo of a red car on the beach", "a photo of a blue car on the beach"),
    ("Another object", "a photo of a purple balloon in the meadow", "a photo of a purple mushroom in the meadow"),
    ("Another place", "a photo of a green house in the snow", "a photo of a green house in the desert"),
)

#: Prompts of a new page.
FIRST = EXAMPLES[0][1:]


def differences(source: str, targets: Sequence[str]) -> str:
    """The targets as HTML, with the words that the source has not marked as new."""
    lines = [
        " ".join(f"<ins>{escape(word)}</ins>" if changed else escape(word) for word, changed in words)
        for words in (changed_words(source, target) for target in targets)
    ]
    return "".join(f"<li>{line}</li>" for line in lines)


def with_word(prompt: str, word: str, vocabulary: Mapping[str, Sequence[str]]) -> str:
    """A prompt with a word of the vocabulary: in the place of the first one of its kind, else at the end."""
    kind = next(words for words in vocabulary.values() if word in words)
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, kind))})\b", re.IGNORECASE)
    if not pattern.search(prompt):
        return f"{prompt} {word}".strip()
    changed = pattern.sub(word, prompt, count=1)
    return re.sub(rf"\ban? (?={re.escape(word)}\b)", "an " if word[0] in "aeiou" else "a ", changed)


def words_of(prompts: Sequence[str]) -> list[str]:
    """Every word of some prompts, once, in order; letter case does not tell words apart."""
    found: dict[str, str] = {}
    for prompt in prompts:
        for word in re.findall(r"\w+(?:['’-]\w+)*", prompt):
            found.setdefault(word.lower(), word)
    return list(found.values())
