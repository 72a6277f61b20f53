"""Gradients of the ops: the equations of :mod:`.ops` run backwards, in terms of the ops themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends.grouping import rows_by_map
from .validation import accumulator_dtype


def sum_shared_heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, H, L, E] summed over the query heads that share one of ``heads``."""
    return tensor if tensor.shape[1] == heads else tensor.unflatten(1, (heads, -1)).sum(2)


def gather_delta(products: Tensor, map_index: Sequence[int], maps: int) -> Tensor:
    """Sum the row sums [B, H, N] of the batch rows that share a map: [G, H, N].

    One sum after the other, because ``index_add_`` on CUDA adds in no fixed order.
    """
    groups = rows_by_map(tuple(int(index) for index in map_index), int(maps))
    zero = products.new_zeros(products.shape[1:])
    return torch.stack([sum((products[row] for row in rows), zero) for rows in groups])


def _row_sums(left: Tensor, right: Tensor) -> Tensor:
    dtype = accumulator_dtype(left.dtype)
    return (left.to(dtype) * right.to(dtype)).sum(-1)


def _wants_map(ctx: Any) -> bool:
    """Whether query, key or bias has a gradient: delta, and with it the product itself, serves these alone."""
    needed = ctx.needs_input_grad
    return bool(needed[0] or needed[1] or needed[3])


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


#: Of the operands of an operator, in their order; None for what has none.
Gradients = tuple[Tensor | None, ...]

_PRODUCT_SETTINGS = 6  # map_index, scale, backend, row_weight, key_lengths, wide


def product_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, bias, *known = inputs[:-_PRODUCT_SETTINGS]
    out, logsumexp = (output, known[0]) if known else output
    ctx.map_index, ctx.scale, ctx.backend, row_weight, ctx.key_lengths, _ = inputs[-_PRODUCT_SETTINGS:]
    ctx.known, ctx.row_weight_place = bool(known), len(inputs) - 3
    kept = out if _wants_map(ctx) else None
    ctx.save_for_backward(query, key, value, bias, row_weight, logsumexp, kept)


def product_backward(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None = None) -> Gradients:
    query, key, value, bias, row_weight, logsumexp, out = ctx.saved_tensors
    if grad_out is None:
        grad_out = value.new_zeros((value.shape[0], *query.shape[1:3], value.shape[3]))
    rest = (ctx.map_index, ctx.scale, ctx.backend)
    weighted = grad_out if row_weight is None else row_weight.unsqueeze(-1) * grad_out
    left = weighted.to(value.dtype)
    grad_value = grad_row_weight = None
    if row_weight is not None and ctx.needs_input_grad[ctx.row_weight_place]:
        # The unweighted product cannot be had from the output where a weight is zero, nor its statistics.
        settings = (*rest, None, ctx.key_lengths)
        if ctx.known:
            product = torch.ops.fpe_kernels.replay(query, key, value, bias, logsumexp, *settings)
        else:
            # With statistics of every row, the gradient of the value can be differentiated for weights of zero.
            product, logsumexp = torch.ops.fpe_kernels.apply(query, key, value, bias, *settings)
            logsumexp = logsumexp.detach()
        grad_row_weight = _row_sums(grad_out, product).sum_to_size(row_weight.shape).to(row_weight.dtype)
    if ctx.needs_input_grad[2]:
        grouped = value.shape[1] != query.shape[1]
        by_head = torch.ops.fpe_kernels.adjoint(query, key, left, bias, logsumexp, *rest, ctx.key_lengths, wide=grouped)
        grad_value = sum_shared_heads(by_head, value.shape[1]).to(value.dtype)
    grads: Gradients = None, None, None
    if _wants_map(ctx):
        delta = gather_delta(_row_sums(grad_out, out), ctx.map_index, query.shape[0])
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


def adjoint_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, weight, bias, logsumexp = inputs[:-5]
    ctx.map_index, ctx.scale, ctx.backend, ctx.key_lengths, _ = inputs[-5:]
    ctx.save_for_backward(query, key, weight, bias, logsumexp)


def adjoint_backward(ctx: Any, grad_out: Tensor) -> Gradients:
    query, key, weight, bias, logsumexp = ctx.saved_tensors
    right = grad_out.to(weight.dtype)
    settings = (ctx.map_index, ctx.scale, ctx.backend, None, ctx.key_lengths)
    grad_weight = torch.ops.fpe_kernels.replay(query, key, right, bias, logsumexp, *settings)
    grads: Gradients = None, None, None
    if _wants_map(ctx):
        delta = gather_delta(_row_sums(weight, grad_weight), ctx.map_index, query.shape[0])
        grads = _map_gradients(ctx, query, key, bias, logsumexp, weight, right, delta)
    return (*grads[:2], grad_weight, grads[2], None, None, None, None, None, None)


def no_second_derivative(ctx: Any, *grads: Any) -> Gradients:
    raise NotImplementedError(
        "attention maps have first derivatives only: create_graph=True cannot go through them. For second derivatives "
        "of a small map, differentiate torch.softmax(scale * query @ key.transpose(-1, -2), -1) @ value instead."
    )


def no_gradient_of_merge(ctx: Any, *grads: Any) -> Gradients:
    """``merge`` serves products without gradients; with them, parts are merged by differentiable arithmetic."""
    raise NotImplementedError("fpe_kernels::merge has no gradient: multiply with fpe_kernels.join([...]), which has.")
