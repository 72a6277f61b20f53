"""Dense oracle: the equations and nothing else.

    A_g = softmax(scale · Q_g K_gᵀ + bias_g)      a row that is masked throughout is zero
    O_b = w_b ⊙ A_g V_b,  Y_b = A_gᵀ W_b                g = map_index[b]
    dS_g = A_g ∘ (Σ_b X_b Y_bᵀ − δ_g)

Every map is materialised. It serves any device and float dtype, float64 above all, to check the other backends.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_map(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return the maps [G, H, N, M] and their row-wise log-sum-exp [G, H, N]."""
    scores = scale * (query @ key.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias
    logsumexp = torch.logsumexp(scores, dim=-1)
    finite = torch.where(logsumexp.isneginf(), 0.0, logsumexp)
    return torch.exp(scores - finite.unsqueeze(-1)), logsumexp


def apply(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    map_index: tuple[int, ...],
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
    known: bool,
    row_weight: Tensor | None = None,
) -> None:
    """Write ``row_weight ⊙ (A[map_index] @ value)`` to ``out`` and, unless it is known, the log-sum-exp."""
    maps, computed = attention_map(query, key, bias, scale)
    product = maps[list(map_index)] @ value
    out.copy_(product if row_weight is None else row_weight.unsqueeze(-1) * product)
    if not known:
        logsumexp.copy_(computed)


def adjoint(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    map_index: tuple[int, ...],
    scale: float,
    out: Tensor,
) -> None:
    """Write ``A[map_index].T @ weight`` to ``out``."""
    maps, _ = attention_map(query, key, bias, scale)
    out.copy_(maps[list(map_index)].transpose(-1, -2) @ weight)


def score_gradient(
    query: Tensor,
    key: Tensor,
    left: Tensor,
    right: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    map_index: tuple[int, ...],
    scale: float,
    grad_query: Tensor,
    grad_key: Tensor,
) -> None:
    """Write the gradients of query and key."""
    maps, _ = attention_map(query, key, bias, scale)
    outer = torch.zeros_like(maps)
    outer.index_add_(0, torch.tensor(map_index, dtype=torch.int64, device=query.device), left @ right.transpose(-1, -2))
    scores = maps * (outer - delta.unsqueeze(-1).to(maps.dtype))
    grad_query.copy_(scale * (scores @ key))
    grad_key.copy_(scale * (scores.transpose(-1, -2) @ query))
