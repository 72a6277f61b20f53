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

    A processor merges heads after attention; in this layout that is a view, not a copy.
    """
    return like.new_empty((batch, tokens, heads, columns), dtype=dtype or like.dtype).transpose(1, 2)


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
    operands = (query, key, value, bias, tuple(map_index), scale, out, logsumexp)
    _write_product(backend, *operands, False, row_weight, _lengths(key_lengths))
    for group, rows in enumerate(rows_by_map(tuple(map_index), query.shape[0])):
        if not rows:
            logsumexp[group] = float("nan")  # no product asked for this map, so nothing computed it
    return out, logsumexp


def _write_product(backend: str, *operands: Any) -> None:
    _, key, _, _, _, _, out, logsumexp, known, row_weight, key_lengths = operands
    if key.shape[2] == 0:
        out.zero_()
        if not known:
            logsumexp.fill_(float("-inf"))
        return
    dispatch.load(backend).apply(*operands[:8], known=known, row_weight=row_weight, key_lengths=key_lengths)


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
    operands = (query, key, value, bias, tuple(map_index), scale, out, logsumexp)
    _write_product(backend, *operands, True, row_weight, _lengths(key_lengths))
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
        operands = (query, key, weight, bias, logsumexp, tuple(map_index), scale, out)
        dispatch.load(backend).adjoint(*operands, key_lengths=_lengths(key_lengths))
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
    operands = (query, key, left, right, delta, bias, logsumexp, tuple(map_index), scale, grad_query, by_head)
    dispatch.load(backend).score_gradient(*operands, key_lengths=_lengths(key_lengths))
    if by_head is not grad_key:
        grad_key.copy_(_sum_shared_heads(by_head, key.shape[1]))
    return grad_query, grad_key


def _sum_shared_heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, H, L, E] summed over the query heads that share one of ``heads``."""
    return tensor if tensor.shape[1] == heads else tensor.unflatten(1, (heads, -1)).sum(2)


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
    grad = torch.zeros_like(bias, memory_format=torch.contiguous_format)
    operands = (query, key, left, right, delta, bias, logsumexp, tuple(map_index), scale, grad)
    dispatch.load("torch").bias_gradient(*operands, key_lengths=_lengths(key_lengths))
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
    lengths = ctx.key_lengths
    if left.shape[-1] == 0:
        # Of the log-sum-exp alone: no column was asked for, and a kernel multiplies at least one.
        left, right = (factor.new_zeros((*factor.shape[:-1], 1)) for factor in (left, right))
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        grad_query, grad_key = torch.ops.fpe_kernels.score_gradient(
            query, key, left, right, delta, bias, *rest, ctx.backend, lengths
        )
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = torch.ops.fpe_kernels.bias_gradient(query, key, left, right, delta, bias, *rest, lengths)
    return grad_query, grad_key, grad_bias


_PRODUCT_SETTINGS = 6  # map_index, scale, backend, row_weight, key_lengths, wide


def _product_context(ctx: Any, inputs: tuple, output: Any) -> None:
    query, key, value, bias, *known = inputs[:-_PRODUCT_SETTINGS]
    out, logsumexp = (output, known[0]) if known else output
    ctx.map_index, ctx.scale, ctx.backend, row_weight, ctx.key_lengths, _ = inputs[-_PRODUCT_SETTINGS:]
    ctx.known, ctx.row_weight_place = bool(known), len(inputs) - 3
    ctx.save_for_backward(query, key, value, bias, row_weight, logsumexp, out)


def _product_backward(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None = None) -> tuple:
    query, key, value, bias, row_weight, logsumexp, out = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    rest = (ctx.map_index, ctx.scale, ctx.backend)
    weighted = grad_out if row_weight is None else row_weight.unsqueeze(-1) * grad_out
    left = weighted.to(value.dtype)
    grad_value = grad_row_weight = None
    if ctx.needs_input_grad[2]:
        grouped = value.shape[1] != query.shape[1]
        by_head = torch.ops.fpe_kernels.adjoint(query, key, left, bias, logsumexp, *rest, ctx.key_lengths, wide=grouped)
        grad_value = _sum_shared_heads(by_head, value.shape[1]).to(value.dtype)
    if row_weight is not None and ctx.needs_input_grad[ctx.row_weight_place]:
        # The unweighted product cannot be had from the output where a weight is zero, nor its statistics.
        settings = (*rest, None, ctx.key_lengths)
        if ctx.known:
            product = torch.ops.fpe_kernels.replay(query, key, value, bias, logsumexp, *settings)
        else:
            product, _ = torch.ops.fpe_kernels.apply(query, key, value, bias, *settings)
        grad_row_weight = _row_sums(grad_out, product).sum_to_size(row_weight.shape).to(row_weight.dtype)
    delta = _gather_delta(_row_sums(grad_out, out), ctx.map_index, query.shape[0])
    if grad_logsumexp is not None:
        delta = delta - grad_logsumexp
    grads = _map_gradients(ctx, query, key, bias, logsumexp, left, value, delta)
    # A known log-sum-exp is that of the same query and key, so its dependence on them is inside delta.
    return (
        *grads[:2],
        grad_value,
        grads[2],
        *((None,) if ctx.known else ()),
        None,
        None,
        None,
        grad_row_weight,
        None,
        None,
    )


def _adjoint_context(ctx: Any, inputs: tuple, output: Any) -> None:
    query, key, weight, bias, logsumexp = inputs[:-5]
    ctx.map_index, ctx.scale, ctx.backend, ctx.key_lengths, _ = inputs[-5:]
    ctx.save_for_backward(query, key, weight, bias, logsumexp)


def _adjoint_backward(ctx: Any, grad_out: Tensor) -> tuple:
    query, key, weight, bias, logsumexp = ctx.saved_tensors
    right = grad_out.to(weight.dtype)
    settings = (ctx.map_index, ctx.scale, ctx.backend, None, ctx.key_lengths)
    grad_weight = torch.ops.fpe_kernels.replay(query, key, right, bias, logsumexp, *settings)
    delta = _gather_delta(_row_sums(weight, grad_weight), ctx.map_index, query.shape[0])
    grads = _map_gradients(ctx, query, key, bias, logsumexp, weight, right, delta)
    return (*grads[:2], grad_weight, grads[2], None, None, None, None, None, None)


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
