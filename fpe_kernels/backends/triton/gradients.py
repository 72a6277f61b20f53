"""The gradients of query and key, launch by launch: chunks of columns that add up in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..grouping import unreferenced
from . import configs
from .backward import prepare
from .configs import MAX_GRADIENT_COLUMNS, Config
from .launch import Launch, product_precision
from .packing import chunks, columns_of
from .plans import launch_all


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
    key_lengths: tuple[int, ...] | None = None,
) -> None:
    """Write the gradients of query and key, the latter [G, H, M, D] with a head for each query head."""
    maps, heads, queries, _ = query.shape
    logsumexp, delta = logsumexp.contiguous(), delta.float().contiguous()
    bias_t = None
    if bias is not None:
        bias = bias.expand(maps, heads, queries, key.shape[2])
        bias_t = bias.transpose(2, 3)
    parts = chunks(map_index, maps, left.shape[3], MAX_GRADIENT_COLUMNS)
    for own, other, own_factor, other_factor, own_bias, gradient, own_statistics in (
        (query, key, left, right, bias, grad_query, True),
        (key, query, right, left, bias_t, grad_key, False),
    ):
        # Several chunks add up, and in float32: the sum is rounded once.
        several = any(not chunk.first for chunk in parts)
        total = torch.empty_like(gradient, dtype=torch.float32) if several else gradient
        tensors = own, other, own_factor, other_factor, own_bias, total, logsumexp, delta
        launch_all(plan, tensors, map_index, scale, own_statistics, configs.gradient_config, key_lengths)
        if several:
            gradient.copy_(total)
        for group in unreferenced(map_index, maps):
            gradient[group] = 0.0


def plan(
    own: Tensor,
    other: Tensor,
    own_factor: Tensor,
    other_factor: Tensor,
    bias: Tensor | None,
    gradient: Tensor,
    logsumexp: Tensor,
    delta: Tensor,
    map_index: tuple[int, ...],
    scale: float,
    own_statistics: bool,
    gradient_config: Callable[..., Config],
    key_lengths: tuple[int, ...] | None = None,
) -> Iterator[Launch]:
    """The launches of one of the two gradients, by the rule given."""
    tf32 = product_precision(own.dtype) == "tf32"
    for chunk in chunks(map_index, own.shape[0], own_factor.shape[3], MAX_GRADIENT_COLUMNS):
        factors = columns_of(own_factor, chunk), columns_of(other_factor, chunk)
        config = gradient_config(own, other, factors[0], chunk, bias is not None, tf32)
        statistics = logsumexp, delta
        yield prepare(
            own, other, *factors, bias, gradient, *statistics, chunk, scale, own_statistics, config, key_lengths
        )
