"""Dense oracle: the equations and nothing else.

    A_g = softmax(scale · Q_g K_gᵀ + bias_g)      a row that is masked throughout is zero
    O_b = w_b ⊙ A_g V_b,  Y_b = A_gᵀ W_b                g = map_index[b]
    dS_g = A_g ∘ (Σ_b X_b Y_bᵀ − δ_g)

with keys past a map's length left out, and heads of the keys and values repeated for the query heads that share them.

Every map is materialised. It serves any device and float dtype, float64 above all, to check the other backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .protocol import Factors, Maps


def attention_map(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    scale: float,
    key_lengths: Sequence[int] | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the maps [G, H, N, M] and their row-wise log-sum-exp [G, H, N].

    A ``known`` log-sum-exp, which need not be that of these keys alone, normalises the maps in place of it.
    """
    scores = scale * (query @ repeated(key, query.shape[1]).transpose(-1, -2))
    if bias is not None:
        scores = scores + bias
    if key_lengths is not None:
        lengths = torch.tensor(key_lengths, device=key.device)
        past = torch.arange(key.shape[2], device=key.device) >= lengths.unsqueeze(1)
        scores = scores.masked_fill(past[:, None, None, :], float("-inf"))
    logsumexp = torch.logsumexp(scores, dim=-1)
    used = logsumexp if known is None else known.to(logsumexp.dtype)
    finite = torch.where(used.isneginf(), 0.0, used)
    return torch.exp(scores - finite.unsqueeze(-1)), logsumexp


def repeated(tensor: Tensor, heads: int) -> Tensor:
    """[B, h, L, E] with each head as often as query heads share it: [B, heads, L, E]."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _existing(tensor: Tensor, key_lengths: Sequence[int] | None, index: Sequence[int]) -> Tensor:
    """``tensor`` [len(index), H, M, E] with zeros where keys do not exist, whatever is there."""
    if key_lengths is None:
        return tensor
    lengths = torch.tensor(key_lengths, device=tensor.device)[list(index)]
    past = torch.arange(tensor.shape[2], device=tensor.device) >= lengths.unsqueeze(1)
    return tensor.masked_fill(past[:, None, :, None], 0.0)


def _maps(maps: Maps, known: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`attention_map` at ``dtype``."""
    bias = None if maps.bias is None else maps.bias.to(dtype)
    return attention_map(maps.query.to(dtype), maps.key.to(dtype), bias, maps.scale, maps.key_lengths, known)


def apply(
    maps: Maps, value: Tensor, out: Tensor, logsumexp: Tensor, known: bool, row_weight: Tensor | None = None
) -> None:
    """Write ``row_weight ⊙ (A[map_index] @ value)`` to ``out`` and, unless it is known, the log-sum-exp."""
    dense, computed = _maps(maps, logsumexp if known else None, out.dtype)
    value = repeated(_existing(value.to(out.dtype), maps.key_lengths, maps.map_index), maps.query.shape[1])
    product = dense[list(maps.map_index)] @ value
    out.copy_(product if row_weight is None else row_weight.unsqueeze(-1) * product)
    if not known:
        logsumexp.copy_(computed)


def adjoint(maps: Maps, weight: Tensor, out: Tensor, logsumexp: Tensor) -> None:
    """Write ``A[map_index].T @ weight`` to ``out``."""
    dense, _ = _maps(maps, logsumexp, out.dtype)
    out.copy_(dense[list(maps.map_index)].transpose(-1, -2) @ weight.to(out.dtype))


def score_gradient(maps: Maps, factors: Factors, grad_query: Tensor, grad_key: Tensor) -> None:
    """Write the gradients of query and key, the latter [G, H, M, D] with a head for each query head."""
    query, index, lengths = maps.query, maps.map_index, maps.key_lengths
    dense, _ = _maps(maps, factors.logsumexp, query.dtype)
    rights = repeated(_existing(factors.right, lengths, index), query.shape[1]).transpose(-1, -2)
    key = repeated(_existing(maps.key, lengths, range(query.shape[0])), query.shape[1])
    outer = torch.zeros_like(dense)
    outer.index_add_(0, torch.tensor(index, dtype=torch.int64, device=query.device), factors.left @ rights)
    scores = dense * (outer - factors.delta.unsqueeze(-1).to(dense.dtype))
    grad_query.copy_(maps.scale * (scores @ key))
    grad_key.copy_(maps.scale * (scores.transpose(-1, -2) @ query))
