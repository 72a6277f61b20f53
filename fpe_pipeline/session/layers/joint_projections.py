"""Queries, keys and values of one segment of a layer of joint attention, as diffusers' ``Attention`` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...edits.joint_products import JointPlan
from .computing import Rows, take
from .joint_computing import SegmentProjections
from .places import Turn

__all__ = ["head_dim", "segment_projections", "segment_rows"]


def head_dim(attn: Any) -> int:
    """Numbers of each head of a layer."""
    if hasattr(attn, "head_dim"):
        return int(attn.head_dim)
    return int((attn.inner_dim if hasattr(attn, "inner_dim") else attn.to_q.out_features) // attn.heads)


def segment_projections(
    attn: Any,
    plan: JointPlan,
    segment: Any,
    tokens: torch.Tensor,
    turn: Turn | None = None,
    *,
    added: bool = False,
    fused: bool = False,
    wide: bool = False,
) -> SegmentProjections:
    """The rows of a segment that the plan uses, projected, normed and turned: [rows, H, tokens, D].

    Args:
        attn: the diffusers ``Attention`` module.
        plan: of the layer.
        segment: "image" or "text", as whose tokens the plan knows them.
        tokens: [B, tokens, C].
        turn: the rotary embedding of queries and keys; None where there is none.
        added: by the weights of the text's own stream.
        fused: by projections that were put together.
        wide: as of :func:`segment_rows`.
    """
    used = [plan.used(part, segment) for part in ("query", "key", "value")]
    if fused:
        together = attn.to_added_qkv if added else attn.to_qkv
        split = [take(part, rows) for part, rows in zip(together(tokens).chunk(3, dim=-1), used, strict=True)]
    else:
        names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
        split = [getattr(attn, name)(take(tokens, rows)) for name, rows in zip(names, used, strict=True)]
    return segment_rows(attn, used, split, turn, added=added, wide=wide)


def segment_rows(
    attn: Any,
    used: Sequence[tuple[int, ...]],
    split: Sequence[torch.Tensor],
    turn: Turn | None = None,
    *,
    added: bool = False,
    wide: bool = False,
    norms: tuple[Any, Any] | None = None,
) -> SegmentProjections:
    """Queries, keys and values that are projected already [rows, tokens, H·D], normed and turned: [rows, H, tokens, D].

    Args:
        used: for each of the three, which rows of the batch they are.
        attn, turn, added: as of :func:`segment_projections`.
        wide: whether queries and keys are normed and turned in float32 at least.
        norms: of queries and of keys, where they have other names than in diffusers' ``Attention``.
    """
    query, key, value = (part.unflatten(-1, (-1, head_dim(attn))) for part in split)
    if wide:
        query, key = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (query, key))
    if norms is None:
        norms = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
    norm_q, norm_k = norms
    query, key = (query if norm_q is None else norm_q(query)), (key if norm_k is None else norm_k(key))
    if turn is not None:  # of no rows there is nothing to turn: where all are known from a recording
        query, key = (turn(part, rows) if rows else part for part, rows in zip((query, key), used[:2], strict=True))
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast too a norm returns a wider type
    parts = zip((query, key, value), used, strict=True)
    return SegmentProjections(*(Rows(part.transpose(1, 2), rows) for part, rows in parts))
