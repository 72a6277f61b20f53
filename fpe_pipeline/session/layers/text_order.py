"""Texts whose padding stands elsewhere than behind them: their tokens in the order that products of texts take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["counts_first", "last_first"]


def counts_first(mask: torch.Tensor) -> torch.Tensor:
    """Of each row the places of its text tokens [B, T], those that count before the others, each in their order.

    Args:
        mask: of the text tokens [B, T], true where they count.
    """
    return (~mask.bool()).to(torch.uint8).argsort(dim=1, stable=True)


def last_first(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """The same [B, longest] among the last tokens of texts, which padding stands before, without a mask.

    Args:
        lengths: of each row, how many of its tokens count, which are the last ones.
        device: to be on.
    """
    longest = max(lengths)
    begins = longest - torch.tensor(lengths, device=device)[:, None]
    return (begins + torch.arange(longest, device=device)) % longest
