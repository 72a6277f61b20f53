"""All wordings of all triples as one table of tokens on the training's device."""

from __future__ import annotations

import torch
from transformers import CLIPTokenizer

from ..scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS, captions, triples
from .tokenizer import MAX_LENGTH

__all__ = ["Captions"]


class Captions:
    """Draws wordings with their shares.

    Args:
        tokenizer: of the captions.
        device: where tokens are drawn.

    Args:
        counts: how many objects, colours and backgrounds there are.
    """

    def __init__(self, tokenizer: CLIPTokenizer, device: torch.device | str) -> None:
        self.counts = [len(OBJECTS), len(COLOURS), len(BACKGROUNDS)]
        every = [captions(*triple) for triple in triples()]
        width = max(map(len, every))
        empty = tokenizer("", padding="max_length", max_length=MAX_LENGTH).input_ids
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        # Every word of a caption is one token, so that words are looked up rather than each of 14,000 texts.
        words = sorted({word for wordings in every for text, _ in wordings for word in _words(text)})
        known = {word: tokenizer(word, add_special_tokens=False).input_ids for word in words}
        table = [width * [empty] for _ in every]
        shares = torch.zeros(len(every), width, dtype=torch.float64)
        for index, wordings in enumerate(every):
            for place, (text, _) in enumerate(wordings):
                tokens = [begin, *(token for word in _words(text) for token in known[word]), end]
                table[index][place] = tokens + empty[len(tokens) :]
            shares[index, : len(wordings)] = torch.tensor([share for _, share in wordings], dtype=torch.float64)
        self._table, self._empty = torch.tensor(table).to(device), torch.tensor(empty).to(device)
        # Where a uniform number passes from one wording to the next; nothing passes the end of a triple's last one.
        bounds = shares.cumsum(1) / shares.sum(1, keepdim=True)
        bounds[bounds > 1 - 1e-9] = 2.0
        self._bounds = bounds[:, :-1].float().to(device)

    def labels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Triples at random, as indices: int64 ``[count, 3]``."""
        device = generator.device
        drawn = [torch.randint(n, (count,), generator=generator, device=device) for n in self.counts]
        return torch.stack(drawn, dim=1)

    def draw(self, labels: torch.Tensor, generator: torch.Generator, drop: float = 0.0) -> torch.Tensor:
        """A wording of each triple.

        Args:
            labels: int64 ``[n, 3]``, indices of object, colour and background.
            generator: on the table's device.
            drop: share of captions that are empty instead.

        Returns:
            Token ids, int64 ``[n, length]``.
        """
        triple = (labels[:, 0] * self.counts[1] + labels[:, 1]) * self.counts[2] + labels[:, 2]
        chosen, dropped = torch.rand(2, len(labels), generator=generator, device=labels.device)
        wording = (chosen[:, None] >= self._bounds[triple]).sum(dim=1)
        tokens = self._table[triple, wording]
        return torch.where((dropped < drop)[:, None], self._empty, tokens)


def _words(text: str) -> list[str]:
    return text.replace(",", " ,").split()
