"""The operators as ``torch.library`` ops: schemas, fakes and gradients. Nothing here imports a backend.

With ``g = map_index[b]``, ``A_g = softmax(scale · Q_g K_gᵀ + bias_g)``:

    apply           O_b = w_b ⊙ A_g V_b                             and L_g, the log-sum-exp of the scores
    replay          the same product from a known L
    merge           w_b ⊙ (the product over these keys and a product O'_b over others, normalised together by L', L)
    adjoint         Y_b = A_gᵀ W_b
    score_gradient  dS_g = A_g ∘ (Σ_b X_b Y_bᵀ − δ_g);  dQ_g = scale · dS_g K_g,  dK_g = scale · dS_gᵀ Q_g
    bias_gradient   dS_g summed over the axes along which the bias was broadcast

Both products have gradients of the same form, so one kernel serves both: for ``apply``, X = dO, Y = V and
δ = Σ_b rowsum(dO_b ∘ O_b) − dL; for ``adjoint``, X = W, Y = dY and δ = Σ_b rowsum(W_b ∘ (A_g dY_b)).

Row weights w [B, H, N] are ones where they are left out. With them, X = w ⊙ dO, δ is as above, dw = rowsum(dO ∘ A V).
A backend may leave out rows whose weights are zero in every b that shares the map: L is +∞ there, the statistics of a
row without probabilities, so that X = 0 and δ = 0 meet A = 0. The L of a weighted apply serves its gradients only.

Keys past ``key_lengths[g]`` do not exist. Keys, and values, may have fewer heads than the queries: query head h reads
head h // (H / heads), and their gradients are sums over the query heads that share one. ``wide`` asks for a result in
the dtype of the statistics, for sums that are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .backends.grouping import rows_by_map
from .backends.protocol import Factors, Maps
from .gradient_rules import (
    adjoint_backward,
    adjoint_context,
    no_gradient_of_merge,
    no_second_derivative,
    product_backward,
    product_context,
    sum_shared_heads,
)
from .partial_softmax import merged_products
from .precision import at_given_dtype
from .validation import accumulator_dtype

_LIBRARY = torch.library.Library("fpe_kernels", "DEF")
_LIBRARY.define(
    "apply(Tensor query, Tensor key, Tensor value, Tensor? bias, int[] map_index, float scale, str backend,"
    " Tensor? row_weight=None, int[]? key_lengths=None, bool wide=False) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "replay(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor logsumexp, int[] map_index, float scale,"
    " str backend, Tensor? row_weight=None, int[]? key_lengths=None, bool wide=False) -> Tensor"
)
_LIBRARY.define(
    "merge(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? logsumexp, int[] map_index, float scale,"
    " str backend, Tensor prior, Tensor prior_logsumexp, Tensor? row_weight=None, int[]? key_lengths=None) -> Tensor"
)
_LIBRARY.define(
    "adjoint(Tensor query, Tensor key, Tensor weight, Tensor? bias, Tensor logsumexp, int[] map_index, float scale,"
    " str backend, int[]? key_lengths=None, bool wide=False) -> Tensor"
)
_LIBRARY.define(
    "score_gradient(Tensor query, Tensor key, Tensor left, Tensor right, Tensor delta, Tensor? bias, Tensor logsumexp,"
    " int[] map_index, float scale, str backend, int[]? key_lengths=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "bias_gradient(Tensor query, Tensor key, Tensor left, Tensor right, Tensor delta, Tensor bias, Tensor logsumexp,"
    " int[] map_index, float scale, int[]? key_lengths=None) -> Tensor"
)


def empty_heads(
    like: Tensor, batch: int, heads: int, tokens: int, columns: int, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised [batch, heads, tokens, columns] whose memory is [batch, tokens, heads, columns].

    A processor merges heads after attention; in this layout that is a view, not a copy. It is no view itself: autograd
    lets nobody change a view in place that was made out of its sight.
    """
    strides = tokens * heads * columns, columns, heads * columns, 1
    return like.new_empty_strided((batch, heads, tokens, columns), strides, dtype=dtype or like.dtype)


def empty_logsumexp(query: Tensor) -> Tensor:
    """An uninitialised [G, H, N] for the statistics of ``query`` [G, H, N, D]."""
    return query.new_empty(query.shape[:3], dtype=accumulator_dtype(query.dtype))


def _empty_product(query: Tensor, operand: Tensor, tokens: int, wide: bool) -> Tensor:
    """[B, H, tokens, E] for a product with ``operand`` [B, h, L, E]."""
    dtype = accumulator_dtype(operand.dtype) if wide else operand.dtype
    return empty_heads(operand, operand.shape[0], query.shape[1], tokens, operand.shape[3], dtype)


def _lengths(key_lengths: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if key_lengths is None else tuple(key_lengths)


def _apply(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    map_index: Sequence[int],
    scale: float,
    backend: str,
    row_weight: Tensor | None = None,
    key_lengths: Sequence[int] | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    out, logsumexp = _empty_product(query, value, query.shape[2], wide), empty_logsumexp(query)
    maps = Maps(query, key, bias, tuple(map_index), scale, _lengths(key_lengths))
    _write_product(backend, maps, value, out, logsumexp, False, row_weight)
    for group, rows in enumerate(rows_by_map(maps.map_index, query.shape[0])):
        if not rows:
            logsumexp[group] = float("nan")  # no product asked for this map, so nothing computed it
    return out, logsumexp


def _write_product(
    backend: str, maps: Maps, value: Tensor, out: Tensor, logsumexp: Tensor, known: bool, row_weight: Tensor | None
) -> None:
    if maps.key.shape[2] == 0:
        out.zero_()
        if not known:
            logsumexp.fill_(float("-inf"))
        return
    dispatch.load(backend).apply(maps, value, out, logsumexp, known, row_weight)


def _apply_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    map_index: Sequence[int],
    scale: float,
    backend: str,
    row_weight: Tensor | None = None,
    key_lengths: Sequence[int] | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    return _empty_product(query, value, query.shape[2], wide), empty_logsumexp(query)


def _replay(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    map_index: Sequence[int],
    scale: float,
    backend: str,
    row_weight: Tensor | None = None,
    key_lengths: Sequence[int] | None = None,
    wide: bool = False,
) -> Tensor:
    out = _empty_product(query, value, query.shape[2], wide)
    maps = Maps(query, key, bias, tuple(map_index), scale, _lengths(key_lengths))
    _write_product(backend, maps, value, out, logsumexp, True, row_weight)
    return out


def _replay_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    map_index: Sequence[int],
    scale: float,
    backend: str,
    row_weight: Tensor | None = None,
    key_lengths: Sequence[int] | None = None,
    wide: bool = False,
) -> Tensor:
    return _empty_product(query, value, query.shape[2], wide)


def _merge(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor | None,
    map_index: Sequence[int],
    scale: float,
    backend: str,
    prior: Tensor,
    prior_logsumexp: Tensor,
    row_weight: Tensor | None = None,
    key_lengths: Sequence[int] | None = None,
) -> Tensor:
    maps = Maps(query, key, bias, tuple(map_index), scale, _lengths(key_lengths))
    known, merging = logsumexp is not None, dispatch.load_merging(backend)
    out = _empty_product(query, value, query.shape[2], wide=merging is None)
    statistics = empty_logsumexp(query) if logsumexp is None else logsumexp
    if merging is not None:
        merging.apply_merged(maps, value, out, statistics, known, row_weight, prior, prior_logsumexp)
        return out
    _write_product(backend, maps, value, out, statistics, known, None)
    own = torch.cat([statistics[entry : entry + 1] for entry in maps.map_index])
    merged, _ = merged_products((out, own), (prior, prior_logsumexp))
    result = empty_heads(value, *out.shape)
    return result.copy_(merged if row_weight is None else row_weight.unsqueeze(-1) * merged)


def _merge_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor | None,
    map_index: Sequence[int],
    scale: float,
    backend: str,
    prior: Tensor,
    prior_logsumexp: Tensor,
    row_weight: Tensor | None = None,
    key_lengths: Sequence[int] | None = None,
) -> Tensor:
    return _empty_product(query, value, query.shape[2], wide=False)


def _adjoint(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    map_index: Sequence[int],
    scale: float,
    backend: str,
    key_lengths: Sequence[int] | None = None,
    wide: bool = False,
) -> Tensor:
    out = _empty_product(query, weight, key.shape[2], wide)
    if key.shape[2] > 0:
        maps = Maps(query, key, bias, tuple(map_index), scale, _lengths(key_lengths))
        dispatch.load(backend).adjoint(maps, weight, out, logsumexp)
    return out


def _adjoint_fake(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    map_index: Sequence[int],
    scale: float,
    backend: str,
    key_lengths: Sequence[int] | None = None,
    wide: bool = False,
) -> Tensor:
    return _empty_product(query, weight, key.shape[2], wide)


def _score_gradient(
    query: Tensor,
    key: Tensor,
    left: Tensor,
    right: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    map_index: Sequence[int],
    scale: float,
    backend: str,
    key_lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    grad_query, grad_key = empty_heads(query, *query.shape), empty_heads(key, *key.shape)
    if key.shape[2] == 0:
        return grad_query.zero_(), grad_key
    by_head = grad_key
    if query.shape[1] != key.shape[1]:
        dtype = accumulator_dtype(key.dtype)
        by_head = empty_heads(key, key.shape[0], query.shape[1], key.shape[2], key.shape[3], dtype)
    maps = Maps(query, key, bias, tuple(map_index), scale, _lengths(key_lengths))
    dispatch.load(backend).score_gradient(maps, Factors(left, right, delta, logsumexp), grad_query, by_head)
    for group, rows in enumerate(rows_by_map(maps.map_index, query.shape[0])):
        if not rows or (maps.key_lengths is not None and maps.key_lengths[group] == 0):
            grad_query[group] = 0.0
            by_head[group] = 0.0
    if by_head is not grad_key:
        grad_key.copy_(sum_shared_heads(by_head, key.shape[1]))
    return grad_query, grad_key


def _score_gradient_fake(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return empty_heads(query, *query.shape), empty_heads(key, *key.shape)


def _bias_gradient(
    query: Tensor,
    key: Tensor,
    left: Tensor,
    right: Tensor,
    delta: Tensor,
    bias: Tensor,
    logsumexp: Tensor,
    map_index: Sequence[int],
    scale: float,
    key_lengths: Sequence[int] | None = None,
) -> Tensor:
    # A bias holds as many numbers as its gradient, so row blocks in plain PyTorch bound the extra memory on any device.
    grad = torch.empty_like(bias, memory_format=torch.contiguous_format)
    maps = Maps(query, key, bias, tuple(map_index), scale, _lengths(key_lengths))
    dispatch.load_torch().bias_gradient(maps, Factors(left, right, delta, logsumexp), grad)
    return grad


def _bias_gradient_fake(query: Tensor, key: Tensor, left: Tensor, right: Tensor, delta: Tensor, bias: Tensor,
                        *args: Any, **kwargs: Any) -> Tensor:  # fmt: skip
    return torch.empty_like(bias, memory_format=torch.contiguous_format)


def _at_given_dtype(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run without autocast, which would round products and statistics of float32 operands."""

    @wraps(implementation)
    def run(query: Tensor, *args: Any) -> Any:
        with at_given_dtype(query.device):
            return implementation(query, *args)

    return run


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise NotImplementedError(
        "torch.vmap cannot map over an attention map: the batch axis decides what is launched. Fold the mapped axis "
        "into the batch, e.g. query.flatten(0, 1), and name the rows that share a map in map_index."
    )


for _name, _implementation, _fake in (
    ("apply", _apply, _apply_fake),
    ("replay", _replay, _replay_fake),
    ("merge", _merge, _merge_fake),
    ("adjoint", _adjoint, _adjoint_fake),
    ("score_gradient", _score_gradient, _score_gradient_fake),
    ("bias_gradient", _bias_gradient, _bias_gradient_fake),
):
    _LIBRARY.impl(_name, _at_given_dtype(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fpe_kernels::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_vmap(f"fpe_kernels::{_name}", _no_vmap, lib=_LIBRARY)
for _name in ("score_gradient", "bias_gradient"):
    torch.library.register_autograd(f"fpe_kernels::{_name}", no_second_derivative, lib=_LIBRARY)
torch.library.register_autograd("fpe_kernels::merge", no_gradient_of_merge, lib=_LIBRARY)
torch.library.register_autograd("fpe_kernels::apply", product_backward, setup_context=product_context, lib=_LIBRARY)
torch.library.register_autograd("fpe_kernels::replay", product_backward, setup_context=product_context, lib=_LIBRARY)
torch.library.register_autograd("fpe_kernels::adjoint", adjoint_backward, setup_context=adjoint_context, lib=_LIBRARY)
