"""All wordings of all triples as one table of tokens on the training's device."""

from __future__ import annotations

import torch
from transformers import CLIPTokenizer

from .scenes import BACKGROUNDS, COLOURS, OBJECTS, captions, triples
from .tokenizer import MAX_LENGTH

__all__ = ["Captions"]


class Captions:
    """Draws wordings with their shares.

    Args:
        tokenizer: of the captions.
        device: where tokens are drawn.

    Attributes:
        counts: how many objects, colours and backgrounds there are.
    """

    def __init__(self, tokenizer: CLIPTokenizer, device: torch.device | str) -> None:
        self.counts = [len(OBJECTS), len(COLOURS), len(BACKGROUNDS)]
        every = [captions(*triple) for triple in triples()]
        width = max(map(len, every))
        texts = [text for wordings in every for text, _ in wordings]
        tokens = tokenizer([*texts, ""], padding="max_length", max_length=MAX_LENGTH).input_ids
        rows, start = torch.tensor(tokens), 0
        self._table = rows[-1].repeat(len(every), width, 1)
        shares = torch.zeros(len(every), width, dtype=torch.float64)
        for index, wordings in enumerate(every):
            self._table[index, : len(wordings)] = rows[start : start + len(wordings)]
            shares[index, : len(wordings)] = torch.tensor([share for _, share in wordings], dtype=torch.float64)
            start += len(wordings)
        self._table, self._empty = self._table.to(device), rows[-1].to(device)
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
