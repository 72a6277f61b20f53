"""Maps each of whose rows is one softmax over its keys, which is what they can be joined by."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from .normal_form import Block, Term
from .views import Operator


class SoftmaxMap(Operator):
    """What an attention map and a joined one have in common; ``wide`` results have the dtype of the statistics."""

    @property
    @abstractmethod
    def key_heads(self) -> int:
        """Heads of the keys."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of what defines it."""

    @property
    @abstractmethod
    def requires_grad(self) -> bool:
        """Whether it takes part in gradients."""

    @property
    @abstractmethod
    def logsumexp(self) -> Tensor:
        """[B, H, N], float32 (float64 beside float64): log Σ_m exp(scores), natural log."""

    @abstractmethod
    def gathered_product(self, value: Tensor, index: tuple[int, ...], weight: Tensor | None) -> Tensor:
        """``weight ⊙ (A[index] @ value)`` for value [len(index), H, M, E]."""

    @abstractmethod
    def gathered_adjoint(self, weight: Tensor, index: tuple[int, ...]) -> Tensor:
        """``A[index].T @ weight`` for weight [len(index), H, N, E]."""

    @abstractmethod
    def gathered_with_logsumexp(self, value: Tensor, index: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """``A[index] @ value``, wide, and the log-sum-exp [len(index) | 1, H, N] of its rows."""

    @abstractmethod
    def queries(self, start: int, stop: int | None = None) -> SoftmaxMap:
        """The map of a range of the query tokens."""

    @abstractmethod
    def keys(self, start: int, stop: int | None = None) -> SoftmaxMap:
        """The softmax over a range of the key tokens alone."""

    @abstractmethod
    def wide_rows(self, index: Tensor) -> Tensor:
        """:meth:`rows`, wide; ``index`` holds positions on the device."""

    @abstractmethod
    def wide_columns(self, index: Tensor) -> Tensor:
        """:meth:`columns`, wide; ``index`` holds positions on the device."""

    def _product(self, value: Tensor) -> Tensor:
        return self.gathered_product(value, tuple(range(self.shape[0])), None)

    def _blocks(self) -> tuple[Block, ...]:
        return (Block((Term(self, tuple(range(self.shape[0]))),)),)

    def rows_at(self, index: Tensor) -> Tensor:
        """:meth:`rows`; ``index`` holds positions on the device."""
        return self.wide_rows(index).to(self.dtype)

    def columns_at(self, index: Tensor) -> Tensor:
        """:meth:`columns`; ``index`` holds positions on the device."""
        return self.wide_columns(index).to(self.dtype)

    def _entries(self) -> Tensor:
        return self.wide_rows(torch.arange(self.shape[2], device=self.device)).to(self.dtype)


def softmax_blocks(candidate: Any, purpose: str) -> tuple[Block, ...]:
    """The blocks of a map each of whose rows is one softmax; refuses others, saying what they were wanted for."""
    blocks: tuple[Block, ...] = candidate._blocks()
    terms = [term for block in blocks for term in block.terms]
    if len(terms) != len(blocks) or not all(term.plain and isinstance(term.map, SoftmaxMap) for term in terms):
        raise TypeError(
            f"{purpose}. It takes maps that are one softmax in each row: an AttentionMap, a joined map, and their "
            f"ranges and gathers, got {candidate!r}. Weight, mix, stack or add the result instead."
        )
    return blocks
