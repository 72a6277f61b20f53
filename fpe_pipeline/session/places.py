"""Rotary embeddings: queries and keys that are turned by their places."""

from __future__ import annotations

import torch

__all__ = ["turned"]


def turned(part: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Queries or keys, each pair of whose numbers is turned by an angle.

    Args:
        part: [..., D], of which numbers 2 i and 2 i + 1 are pair i.
        cosines, sines: of the angles, broadcast over [..., D / 2]; computed in the wider type of both.
    """
    first, second = part.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = first * cosines - second * sines, first * sines + second * cosines
    return torch.stack(pairs, dim=-1).flatten(-2).to(part.dtype)
