"""Rotary embeddings: queries and keys that are turned by their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers.models.embeddings import apply_rotary_emb

from .computing import take

__all__ = ["Turn", "by_heads", "by_matrices", "by_numbers", "by_tables", "by_tables_of_rows", "turned"]

#: Queries or keys [rows, tokens, H, D], of these rows of the batch, turned by their places.
Turn = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]


def turned(part: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Queries or keys, each pair of whose numbers is turned by an angle.

    Args:
        part: [..., D], of which numbers 2 i and 2 i + 1 are pair i.
        cosines, sines: of the angles, broadcast over [..., D / 2]; computed in the wider type of both.
    """
    first, second = part.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = first * cosines - second * sines, first * sines + second * cosines
    return torch.stack(pairs, dim=-1).flatten(-2).to(part.dtype)


def by_tables(rotary: tuple[torch.Tensor, torch.Tensor] | None, parts_at: int = -1) -> Turn | None:
    """By cosines and sines [tokens, D] that all rows share, as diffusers turns; None where there are none.

    Args:
        parts_at: where the two numbers of a pair stand: side by side (-1), or in the halves of a head (-2).
    """
    if rotary is None:
        return None
    return lambda part, rows: apply_rotary_emb(part, rotary, use_real_unbind_dim=parts_at, sequence_dim=1)


def by_tables_of_rows(cosines: torch.Tensor, sines: torch.Tensor) -> Turn:
    """By cosines and sines [B, tokens, D], each row of the batch by its own; the two numbers of a pair stand in the
    halves of a head."""

    def turn(part: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        first, second = part.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
        return part * take(cosines, rows).unsqueeze(2) + across * take(sines, rows).unsqueeze(2)

    return turn


def by_heads(rotary: tuple[torch.Tensor, torch.Tensor] | None) -> Turn | None:
    """By cosines and sines [tokens, H, D / 2] of each head's own angles, which all rows share; None where there are
    none."""
    if rotary is None:
        return None
    return lambda part, rows: turned(part, *rotary)


def by_numbers(places: torch.Tensor) -> Turn:
    """By complex numbers of absolute value 1, [B, tokens, D / 2], each row of the batch by its own."""

    def turn(part: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        wide, own = torch.promote_types(part.dtype, torch.float32), take(places, rows).unsqueeze(2)
        return turned(part, own.real.to(wide), own.imag.to(wide))

    return turn


def by_matrices(places: torch.Tensor) -> Turn:
    """By matrices of rotation [tokens, pairs, 2, 2] that all rows share; numbers of a head behind these pairs stay."""
    cosines, sines = (places[:, None, :, which, 0] for which in (0, 1))
    first = 2 * places.shape[1]

    def turn(part: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return torch.cat([turned(part[..., :first], cosines, sines), part[..., first:]], dim=-1)

    return turn
