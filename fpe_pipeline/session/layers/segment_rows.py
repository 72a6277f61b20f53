"""Projected rows of one segment as products name them: a row's own tokens, those of two rows mixed, or zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

from ...edits.joint_products import JointProduct, MixedRows
from .computing import Rows

__all__ = ["as_long", "column_values", "mixed", "tokens_of", "values_of"]


def as_long(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Text tokens [1, H, T, D] with zeros behind them, or without some of their padding: [1, H, count, D]."""
    have = tokens.shape[2]
    return functional.pad(tokens, (0, 0, 0, count - have)) if have < count else tokens[:, :, :count]


def tokens_of(rows: Rows, named: Sequence[int | MixedRows]) -> torch.Tensor:
    """The tokens of each entry [len(named), H, N, D]."""
    plain = [row for row in named if isinstance(row, int)]
    if len(plain) == len(named):
        return rows.take(plain)
    return torch.cat([_mixed(rows, row) if isinstance(row, MixedRows) else rows.take([row]) for row in named])


def values_of(
    rows: Rows, named: Sequence[int | MixedRows | None], mixings: Sequence[torch.Tensor | None] = ()
) -> torch.Tensor:
    """The values of each entry [len(named), H, N, E], zeros for None; where there are mixings [N, N], times them."""
    known = [row for row in named if row is not None]
    mixings = mixings or (None,) * len(named)
    if len(known) == len(named) and all(mixing is None for mixing in mixings):
        return tokens_of(rows, known)
    pieces = []
    for row, mixing in zip(named, mixings, strict=True):
        if row is None:
            pieces.append(torch.zeros_like(rows.tensor[:1]))
        else:
            tokens = tokens_of(rows, [row])
            pieces.append(tokens if mixing is None else _mixed_text(mixing, tokens))
    return torch.cat(pieces)


def column_values(
    terms: Sequence[tuple[int, JointProduct]],
    columns: Mapping[int, torch.Tensor],
    values: torch.Tensor,
    texts: int,
    references: int = 0,
) -> torch.Tensor:
    """For each term its row's columns in the place of text values, mixed as they are, and zeros elsewhere.

    Args:
        terms: with their rows.
        columns: for some rows, [T, C].
        values: of the terms, those of the image first: [terms, H, N + T, E].
        texts: T, the text tokens of the layer.
        references: further tokens behind them, which no column is of.

    Returns:
        [terms, H, N + T, C] with the largest C.

    Raises:
        ValueError: columns over another number of text tokens.
    """
    out = values.new_zeros((*values.shape[:-1], max(given.shape[-1] for given in columns.values())))
    for place, (row, term) in zip(out, terms, strict=True):
        if row in columns and term.value.text is not None:
            given = columns[row].to(values)
            if given.shape[0] != texts:
                raise ValueError(
                    f"words were placed among {given.shape[0]} text tokens, and the layer receives {texts}: the text "
                    "was encoded otherwise than was told; pass prompts and not embeddings"
                )
            given = given if term.mixing is None else _mixed_text(term.mixing, given)
            stop = values.shape[2] - references
            place[:, stop - texts : stop, : given.shape[-1]] = given
    return out


def _mixed_text(mixing: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A mixing [T, T'] times tokens [..., T', E].

    Raises:
        ValueError: it was made for texts of another length.
    """
    if mixing.shape[-1] != tokens.shape[-2] or mixing.shape[-2] != tokens.shape[-2]:
        raise ValueError(
            f"the edit's words were placed among {mixing.shape[-1]} text tokens, and the layer receives "
            f"{tokens.shape[-2]}: the text was encoded otherwise than the edit was told; pass prompts and not "
            "embeddings, with the max_sequence_length of the whole run"
        )
    return mixing.to(tokens) @ tokens


def _mixed(rows: Rows, named: MixedRows) -> torch.Tensor:
    return mixed(rows.take([named.kept]), rows.take([named.other]), named.share)


def mixed(kept: torch.Tensor, other: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Tokens [1, H, N, D] of two rows, of the first by these shares [N].

    Raises:
        ValueError: shares of another number of tokens.
    """
    share = share[:, None]
    if share.shape[0] != kept.shape[2]:
        raise ValueError(f"expected a mask of the layer's {kept.shape[2]} image tokens, got one of {share.shape[0]}")
    wide = torch.promote_types(kept.dtype, torch.float32)
    share = share.to(wide)
    return (share * kept.to(wide) + (1 - share) * other.to(wide)).to(kept.dtype)
