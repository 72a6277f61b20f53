"""Products and log-sum-exps over parts of the keys, put together as those over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merged_products(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Products [B, H, N, E] and log-sum-exps [B | 1, H, N] of two parts, normalised together.

    Where no gradient is recorded the first product is overwritten.
    """
    (out, one), (other, two) = first, second
    total = total_logsumexp([one, two])
    finite = torch.where(total.isneginf(), 0.0, total)
    shares = [torch.exp(own - finite).unsqueeze(-1) for own in (one, two)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*first, *second)):
        return shares[0] * out + shares[1] * other, total
    return out.mul_(shares[0]).addcmul_(shares[1], other), total


def total_logsumexp(statistics: Sequence[Tensor]) -> Tensor:
    """log Σ exp of log-sum-exps; −∞ where all are, with gradients of zero there."""
    if len(statistics) == 1:
        return statistics[0]
    largest = statistics[0].detach()
    for own in statistics[1:]:
        largest = torch.maximum(largest, own.detach())
    largest = torch.where(largest.isneginf(), 0.0, largest)
    total = sum(torch.exp(own - largest) for own in statistics[1:]) + torch.exp(statistics[0] - largest)
    return torch.where(total == 0.0, float("-inf"), largest + torch.log(torch.where(total == 0.0, 1.0, total)))
