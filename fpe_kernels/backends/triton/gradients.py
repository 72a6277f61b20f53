"""The gradients of query and key, launch by launch: chunks of columns that add up in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..protocol import Factors, Maps
from . import configs
from .configs import MAX_GRADIENT_COLUMNS, Config
from .gradient_launch import GradientTensors, prepare
from .launch import Launch, product_precision
from .packing import chunks
from .plans import launch_all


class GradientSettings(NamedTuple):
    """What the launches follow from besides the tensors; ``own_statistics`` says that the gradient is the query's."""

    map_index: tuple[int, ...]
    scale: float
    key_lengths: tuple[int, ...] | None
    own_statistics: bool
    gradient_config: Callable[..., Config]


def score_gradient(maps: Maps, factors: Factors, grad_query: Tensor, grad_key: Tensor) -> None:
    """Write the gradients of query and key, the latter [G, H, M, D] with a head for each query head."""
    query, key, bias, map_index, scale, key_lengths = maps
    left, right, delta, logsumexp = factors
    statistics = logsumexp.contiguous(), delta.float().contiguous()
    bias_t = None
    if bias is not None:
        bias = bias.expand(*query.shape[:3], key.shape[2])
        bias_t = bias.transpose(2, 3)
    parts = chunks(map_index, query.shape[0], left.shape[3], MAX_GRADIENT_COLUMNS)
    # Several chunks add up, and in float32: the sum is rounded once.
    several = any(not chunk.first for chunk in parts)
    for inputs, gradient, own_statistics in (
        ((query, key, left, right, bias), grad_query, True),
        ((key, query, right, left, bias_t), grad_key, False),
    ):
        total = torch.empty_like(gradient, dtype=torch.float32) if several else gradient
        settings = GradientSettings(map_index, scale, key_lengths, own_statistics, configs.gradient_config)
        launch_all(plan, GradientTensors(*inputs, total, *statistics), settings)
        if several:
            gradient.copy_(total)


def plan(tensors: GradientTensors, settings: GradientSettings) -> Iterator[Launch]:
    """The launches of one of the two gradients."""
    own, other, bias = tensors.own, tensors.other, tensors.bias is not None
    tf32 = product_precision(own.dtype) == "tf32"
    for chunk in chunks(settings.map_index, own.shape[0], tensors.own_factor.shape[3], MAX_GRADIENT_COLUMNS):
        part = tensors.of(chunk)
        config = settings.gradient_config(own, other, part.own_factor, chunk, bias, tf32)
        yield prepare(part, chunk, settings.scale, settings.own_statistics, config, settings.key_lengths)
