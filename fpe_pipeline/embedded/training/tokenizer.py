"""The tokenizer: byte-pair merges that make every caption word one token, in CLIP's own file format.

Words outside the captions fall apart into letters, and anything else into the unknown token: nothing raises.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from ..scenes.scenes import phrasings, triples

__all__ = ["MAX_LENGTH", "build_tokenizer", "caption_words", "train_merges"]

MAX_LENGTH = 24
_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_SYMBOLS = string.ascii_lowercase + string.digits + ",.'-!?"


def caption_words() -> Counter[str]:
    """How often each word occurs over all phrasings of all triples."""
    return Counter(word for triple in triples() for text in phrasings(*triple) for word in re.findall(r"[a-z]+", text))


def train_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one symbol; ties break alphabetically."""
    spelled = {word: [*word[:-1], word[-1] + _WORD_END] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merge(symbols, best) for word, symbols in spelled.items()}


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    result, i = [], 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            result.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            result.append(symbols[i])
            i += 1
    return result


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write ``vocab.json``, ``merges.txt`` and the configuration to ``folder``; return the tokenizer they make."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = train_merges(caption_words())
    letters = [*_SYMBOLS, *(symbol + _WORD_END for symbol in _SYMBOLS)]
    tokens = [*letters, *("".join(pair) for pair in merges), _START, _END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": _END,
        "unk_token": _END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)
