"""What a backend is given and what it has: the operands that every call shares as one record, and the calls by type.

A backend is a module. It writes into what it is given and returns nothing. Shapes, dtypes and devices are checked
before, and there is at least one key. What belongs to maps that no batch row names, or that have no keys, it may leave
as it is in gradients and statistics: the operators write it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ..ready import ReadyCall


class Maps(NamedTuple):
    """The maps of a call, A_g = softmax(scale · Q_g K_gᵀ + bias_g), and which batch rows name which.

    Args:
        query: [G, H, N, D].
        key: [G, h, M, D]; query head i reads head i // (H / h).
        bias: added to the scores, [G | 1, H | 1, N | 1, M | 1], or None.
        map_index: B ints in [0, G): the map of each batch row.
        scale: of the scores.
        key_lengths: G ints in [0, M], the keys of each map that exist; None for all.
    """

    query: Tensor
    key: Tensor
    bias: Tensor | None
    map_index: tuple[int, ...]
    scale: float
    key_lengths: tuple[int, ...] | None = None


class Factors(NamedTuple):
    """What gradients of the scores are made of: dS_g = A_g ∘ (Σ_b left_b right_bᵀ − delta_g).

    Args:
        left: [B, H, N, E].
        right: [B, h, M, E].
        delta: [G, H, N], in the dtype of the statistics.
        logsumexp: [G, H, N], the known statistics of the maps.
    """

    left: Tensor
    right: Tensor
    delta: Tensor
    logsumexp: Tensor


class Backend(Protocol):
    """What computes products with maps, and their gradients."""

    def apply(
        self, maps: Maps, value: Tensor, out: Tensor, logsumexp: Tensor, known: bool, row_weight: Tensor | None = None
    ) -> None:
        """Write ``row_weight ⊙ (A[map_index] @ value)`` to ``out`` and, unless it is known, the log-sum-exp.

        Args:
            value: [B, h, M, E].
            out: [B, H, N, E], in the dtype of the value or that of the statistics.
            logsumexp: [G, H, N]; read where it is ``known``, else written.
            row_weight: [B | 1, H | 1, N | 1]; None for ones.
        """

    def adjoint(self, maps: Maps, weight: Tensor, out: Tensor, logsumexp: Tensor) -> None:
        """Write ``A[map_index].T @ weight`` to ``out`` [B, H, M, E], for weight [B, H, N, E]."""

    def score_gradient(self, maps: Maps, factors: Factors, grad_query: Tensor, grad_key: Tensor) -> None:
        """Write the gradients of query and key, the latter [G, H, M, D] with a head for each query head."""


class MergingBackend(Backend, Protocol):
    """One that takes up a product over other keys in the launch of its own."""

    def apply_merged(
        self,
        maps: Maps,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        known: bool,
        row_weight: Tensor | None,
        prior: Tensor,
        prior_logsumexp: Tensor,
    ) -> None:
        """As :meth:`Backend.apply`, merged with ``prior`` [B, H, N, E], whose log-sum-exp is [B, H, N], both wide."""


class BiasBackend(Backend, Protocol):
    """One that has the gradient of the bias."""

    def bias_gradient(self, maps: Maps, factors: Factors, grad: Tensor) -> None:
        """Write dS to ``grad``, which has the shape of the bias, summed over the axes of size 1."""


class ReadyBackend(Backend, Protocol):
    """One that can have a call ready to be made again, as :mod:`fpe_kernels.ready` says."""

    def ready_call(
        self, query: Tensor, key: Tensor, value: Tensor, map_index: tuple[int, ...], scale: float, out: Tensor
    ) -> ReadyCall | None:
        """The product of tensors of the same layout, which gave ``out``; None where none can be had ready."""
