"""The operators as ``torch.library`` ops: schemas, fakes and gradients. Nothing here imports a backend.

With ``g = map_index[b]``, ``A_g = softmax(scale · Q_g K_gᵀ + bias_g)``:

    apply           O_b = w_b ⊙ A_g V_b                             and L_g, the log-sum-exp of the scores
    replay          the same product from a known L
    adjoint         Y_b = A_gᵀ W_b
    score_gradient  dS_g = A_g ∘ (Σ_b X_b Y_bᵀ − δ_g);  dQ_g = scale · dS_g K_g,  dK_g = scale · dS_gᵀ Q_g
    bias_gradient   dS_g summed over the axes along which the bias was broadcast

Both products have gradients of the same form, so one kernel serves both: for ``apply``, X = dO, Y = V and
δ = Σ_b rowsum(dO_b ∘ O_b) − dL; for ``adjoint``, X = W, Y = dY and δ = Σ_b rowsum(W_b ∘ (A_g dY_b)).

Row weights w [B, H, N] are ones where they are left out. With them, X = w ⊙ dO, δ is as above, dw = rowsum(dO ∘ A V).
A backend may leave out rows whose weights are zero in every b that shares the map: L is +∞ there, the statistics of a
row without probabilities, so that X = 0 and δ = 0 meet A = 0. The L of a weighted apply serves its gradients only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .backends.grouping import rows_by_map
from .precision import at_given_dtype
from .validation import accumulator_dtype

_LIBRARY = torch.library.Library("fpe_kernels", "DEF")
_LIBRARY.define(
    "apply(Tensor query, Tensor key, Tensor value, Tensor? bias, int[] map_index, float scale, str backend,"
    " Tensor? row_weight=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "replay(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor logsumexp, int[] map_index, float scale,"
    " str backend, Tensor? row_weight=None) -> Tensor"
)
_LIBRARY.define(
    "adjoint(Tensor query, Tensor key, Tensor weight, Tensor? bias, Tensor logsumexp, int[] map_index, float scale,"
    " str backend) -> Tensor"
)
_LIBRARY.define(
    "score_gradient(Tensor query, Tensor key, Tensor left, Tensor right, Tensor delta, Tensor? bias, Tensor logsumexp,"
    " int[] map_index, float scale, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "bias_gradient(Tensor query, Tensor key, Tensor left, Tensor right, Tensor delta, Tensor bias, Tensor logsumexp,"
    " int[] map_index, float scale) -> Tensor"
)


def empty_heads(like: Tensor, batch: int, heads: int, tokens: int, columns: int) -> Tensor:
    """An uninitialised [batch, heads, tokens, columns] whose memory is [batch, tokens, heads, columns].

    A processor merges heads after attention; in this layout that is a view, not a copy.
    """
    return like.new_empty((batch, tokens, heads, columns)).transpose(1, 2)


def empty_logsumexp(query: Tensor) -> Tensor:
    """An uninitialised [G, H, N] for the statistics of ``query`` [G, H, N, D]."""
    return query.new_empty(query.shape[:3], dtype=accumulator_dtype(query.dtype))


def _apply(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    map_index: Sequence[int],
    scale: float,
    backend: str,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = empty_heads(value, value.shape[0], value.shape[1], query.shape[2], value.shape[3])
    logsumexp = empty_logsumexp(query)
    dispatch.load(backend).apply(
        query, key, value, bias, tuple(map_index), scale, out, logsumexp, known=False, row_weight=row_weight
    )
    for group, rows in enumerate(rows_by_map(tuple(map_index), query.shape[0])):
        if not rows:
            logsumexp[group] = float("nan")  # no product asked for this map, so nothing computed it
    return out, logsumexp


def _apply_fake(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    out = empty_heads(value, value.shape[0], value.shape[1], query.shape[2], value.shape[3])
    return out, empty_logsumexp(query)


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
) -> Tensor:
    out = empty_heads(value, value.shape[0], value.shape[1], query.shape[2], value.shape[3])
    dispatch.load(backend).apply(
        query, key, value, bias, tuple(map_index), scale, out, logsumexp, known=True, row_weight=row_weight
    )
    return out


def _replay_fake(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return empty_heads(value, value.shape[0], value.shape[1], query.shape[2], value.shape[3])


def _adjoint(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    map_index: Sequence[int],
    scale: float,
    backend: str,
) -> Tensor:
    out = empty_heads(weight, weight.shape[0], weight.shape[1], key.shape[2], weight.shape[3])
    dispatch.load(backend).adjoint(query, key, weight, bias, logsumexp, tuple(map_index), scale, out)
    return out


def _adjoint_fake(query: Tensor, key: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return empty_heads(weight, weight.shape[0], weight.shape[1], key.shape[2], weight.shape[3])


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
) -> tuple[Tensor, Tensor]:
    grads = empty_heads(query, *query.shape), empty_heads(key, *key.shape)
    dispatch.load(backend).score_gradient(
        query, key, left, right, delta, bias, logsumexp, tuple(map_index), scale, *grads
    )
    return grads


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
) -> Tensor:
    # A bias holds as many numbers as its gradient, so row blocks in plain PyTorch bound the extra memory on any device.
    grad = torch.zeros_like(bias, memory_format=torch.contiguous_format)
    dispatch.load("torch").bias_gradient(query, key, left, right, delta, bias, logsumexp, tuple(map_index), scale, grad)
    return grad


def _bias_gradient_fake(query: Tensor, key: Tensor, left: Tensor, right: Tensor, delta: Tensor, bias: Tensor,
                        *args: Any, **kwargs: Any) -> Tensor:  # fmt: skip
    return torch.zeros_like(bias, memory_format=torch.contiguous_format)


def _gather_delta(products: Tensor, map_index: Sequence[int], maps: int) -> Tensor:
    """Sum the row sums [B, H, N] of the batch rows that share a map: [G, H, N].

    One sum after the other, because ``index_add_`` on CUDA adds in no fixed order.
    """
    groups = rows_by_map(tuple(int(index) for index in map_index), int(maps))
    zero = products.new_zeros(products.shape[1:])
    return torch.stack([sum((products[row] for row in rows), zero) for rows in groups])


def _row_sums(left: Tensor, right: Tensor) -> Tensor:
    dtype = accumulator_dtype(left.dtype)
    return (left.to(dtype) * right.to(dtype)).sum(-1)


def _map_gradients(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    left: Tensor,
    right: Tensor,
    delta: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for query, key and bias, from dS = A ∘ (Σ left rightᵀ − delta); ``ctx`` says which are wanted."""
    rest = (logsumexp, ctx.map_index, ctx.scale)
    grad_query = grad_key = grad_bias = None
    if left.shape[-1] == 0:
        # Of the log-sum-exp alone: no column was asked for, and a kernel multiplies at least one.
        left, right = (factor.new_zeros((*factor.shape[:-1], 1)) for factor in (left, right))
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        grad_query, grad_key = torch.ops.fpe_kernels.score_gradient(
            query, key, left, right, delta, bias, *rest, ctx.backend
        )
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = torch.ops.fpe_kernels.bias_gradient(query, key, left, right, delta, bias, *rest)
    return grad_query, grad_key, grad_bias


def _product_context(ctx: Any, inputs: tuple, output: Any) -> None:
    query, key, value, bias, *known = inputs[:-4]
    out, logsumexp = (output, known[0]) if known else output
    ctx.map_index, ctx.scale, ctx.backend, row_weight = inputs[-4:]
    ctx.known, ctx.row_weight_place = bool(known), len(inputs) - 1
    ctx.save_for_backward(query, key, value, bias, row_weight, logsumexp, out)


def _product_backward(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None = None) -> tuple:
    query, key, value, bias, row_weight, logsumexp, out = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    rest = (ctx.map_index, ctx.scale, ctx.backend)
    left = grad_out if row_weight is None else (row_weight.unsqueeze(-1) * grad_out).to(grad_out.dtype)
    grad_value = grad_row_weight = None
    if ctx.needs_input_grad[2]:
        grad_value = torch.ops.fpe_kernels.adjoint(query, key, left, bias, logsumexp, *rest)
    if row_weight is not None and ctx.needs_input_grad[ctx.row_weight_place]:
        # The unweighted product cannot be had from the output where a weight is zero, nor its statistics.
        if ctx.known:
            product = torch.ops.fpe_kernels.replay(query, key, value, bias, logsumexp, *rest)
        else:
            product, _ = torch.ops.fpe_kernels.apply(query, key, value, bias, *rest)
        grad_row_weight = _row_sums(grad_out, product).sum_to_size(row_weight.shape).to(row_weight.dtype)
    delta = _gather_delta(_row_sums(grad_out, out), ctx.map_index, query.shape[0])
    if grad_logsumexp is not None:
        delta = delta - grad_logsumexp
    grads = _map_gradients(ctx, query, key, bias, logsumexp, left, value, delta)
    # A known log-sum-exp is that of the same query and key, so its dependence on them is inside delta.
    return (*grads[:2], grad_value, grads[2], *((None,) if ctx.known else ()), None, None, None, grad_row_weight)


def _adjoint_context(ctx: Any, inputs: tuple, output: Any) -> None:
    query, key, weight, bias, logsumexp = inputs[:-3]
    ctx.map_index, ctx.scale, ctx.backend = inputs[-3:]
    ctx.save_for_backward(query, key, weight, bias, logsumexp)


def _adjoint_backward(ctx: Any, grad_out: Tensor) -> tuple:
    query, key, weight, bias, logsumexp = ctx.saved_tensors
    grad_weight = torch.ops.fpe_kernels.replay(
        query, key, grad_out, bias, logsumexp, ctx.map_index, ctx.scale, ctx.backend
    )
    delta = _gather_delta(_row_sums(weight, grad_weight), ctx.map_index, query.shape[0])
    grads = _map_gradients(ctx, query, key, bias, logsumexp, weight, grad_out, delta)
    return (*grads[:2], grad_weight, grads[2], None, None, None, None)


def _at_given_dtype(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run without autocast, which would round products and statistics of float32 operands."""

    @wraps(implementation)
    def run(query: Tensor, *args: Any) -> Any:
        with at_given_dtype(query.device):
            return implementation(query, *args)

    return run


def _no_second_derivative(ctx: Any, *grads: Any) -> tuple:
    raise NotImplementedError(
        "attention maps have first derivatives only: create_graph=True cannot go through them. For second derivatives "
        "of a small map, differentiate torch.softmax(scale * query @ key.transpose(-1, -2), -1) @ value instead."
    )


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise NotImplementedError(
        "torch.vmap cannot map over an attention map: the batch axis decides what is launched. Fold the mapped axis "
        "into the batch, e.g. query.flatten(0, 1), and name the rows that share a map in map_index."
    )


for _name, _implementation, _fake in (
    ("apply", _apply, _apply_fake),
    ("replay", _replay, _replay_fake),
    ("adjoint", _adjoint, _adjoint_fake),
    ("score_gradient", _score_gradient, _score_gradient_fake),
    ("bias_gradient", _bias_gradient, _bias_gradient_fake),
):
    _LIBRARY.impl(_name, _at_given_dtype(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fpe_kernels::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_vmap(f"fpe_kernels::{_name}", _no_vmap, lib=_LIBRARY)
for _name in ("score_gradient", "bias_gradient"):
    torch.library.register_autograd(f"fpe_kernels::{_name}", _no_second_derivative, lib=_LIBRARY)
torch.library.register_autograd("fpe_kernels::apply", _product_backward, setup_context=_product_context, lib=_LIBRARY)
torch.library.register_autograd("fpe_kernels::replay", _product_backward, setup_context=_product_context, lib=_LIBRARY)
torch.library.register_autograd("fpe_kernels::adjoint", _adjoint_backward, setup_context=_adjoint_context, lib=_LIBRARY)
