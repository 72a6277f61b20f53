"""Ranges of tokens of a map: entries of some keys as they are, without a bias or weights of 0 and 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .normal_form import gathered_rows
from .softmax_map import SoftmaxMap


class KeyBlock:
    """The entries of a range of a softmax's keys: rows of the range's own softmax, times its share of each row.

    A[:, k:l] = exp(L_range − L) ⊙ A.keys(k, l), with the log-sum-exps of the range and of all keys.
    """

    def __init__(self, whole: SoftmaxMap, start: int, stop: int) -> None:
        self._whole, self._range = whole, (start, stop)
        self._part = whole.keys(start, stop)

    @property
    def shape(self) -> torch.Size:
        return self._part.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._part.dtype

    @property
    def device(self) -> torch.device:
        return self._part.device

    @property
    def key_heads(self) -> int:
        return self._part.key_heads

    @property
    def nbytes(self) -> int:
        return self._whole.nbytes

    @property
    def requires_grad(self) -> bool:
        return self._whole.requires_grad

    def gathered_product(self, value: Tensor, index: tuple[int, ...], weight: Tensor | None) -> Tensor:
        out, logsumexp = self._part.gathered_with_logsumexp(value, index)
        share = self._share(logsumexp, gathered_rows(self._whole.logsumexp, index))
        share = share if weight is None else share * weight
        return (share.unsqueeze(-1) * out).to(self.dtype)

    def gathered_adjoint(self, weight: Tensor, index: tuple[int, ...]) -> Tensor:
        share = gathered_rows(self._share(self._part.logsumexp, self._whole.logsumexp), index)
        return self._part.gathered_adjoint((share.unsqueeze(-1) * weight).to(weight.dtype), index)

    def queries(self, start: int, stop: int | None = None) -> KeyBlock:
        return KeyBlock(self._whole.queries(start, stop), *self._range)

    def rows_at(self, index: Tensor) -> Tensor:
        return self._whole.rows_at(index)[..., slice(*self._range)]

    @staticmethod
    def _share(logsumexp: Tensor, whole: Tensor) -> Tensor:
        # A row that is masked throughout has no entry in the range either.
        return torch.exp(logsumexp - torch.where(whole.isneginf(), 0.0, whole))


def once_for_each(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``change`` of a map, the same object for the same map: what several terms share stays shared."""
    changed: list[tuple[Any, Any]] = []

    def of(whole: Any) -> Any:
        for known, result in changed:
            if known is whole:
                return result
        changed.append((whole, change(whole)))
        return changed[-1][1]

    return of
