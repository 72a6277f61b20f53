"""A layer with its maps written out: softmax matrices that are stored, edited and multiplied, in float64."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fpe_kernels import AttentionMap, LinearMap

from ..edits.products import Product

__all__ = ["DenseLayer", "edited_map", "edited_operator", "finished", "projected", "value_tokens"]

# Added to variances by adaptive instance normalisation.
_EPSILON = 1e-5
#: The fields of a product that are written out here; another would be left out in silence.
WRITTEN_OUT = ("query", "keys", "values", "weight", "mixing", "style", "shifts", "scale", "styled", "scales")


@dataclass(frozen=True)
class DenseLayer:
    """The projected rows of one call of a layer: what an edit's equation is written with.

    Args:
        query: [rows, H, N, D], float64.
        key: [rows, H, M, D].
        value: [rows, H, M, E].
        scale: what scores are multiplied with.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float

    def map(self, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
        """``softmax(scale · query keyᵀ + bias)``, stored: [H, N, M] of query [H, N, D] and key [H, M, D]."""
        scores = self.scale * query @ key.transpose(-1, -2) + bias
        shares = torch.exp(scores - scores.amax(-1, keepdim=True))
        return shares / shares.sum(-1, keepdim=True)

    def own(self, row: int) -> torch.Tensor:
        """What a row's attention is without any edit: [H, N, E]."""
        return self.map(self.query[row], self.key[row]) @ self.value[row]


def projected(attn: Any, hidden_states: torch.Tensor, context: torch.Tensor | None, temb: Any = None) -> DenseLayer:
    """Queries, keys and values of every row of a diffusers ``Attention``."""
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    if context is None:
        context = hidden_states
    elif attn.norm_cross is not None:
        context = attn.norm_encoder_hidden_states(context)

    def heads(projection: Any, tokens: torch.Tensor, norm: Any = None) -> torch.Tensor:
        split: torch.Tensor = projection(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        normed: torch.Tensor = split if norm is None else norm(split)
        return normed

    query, key = heads(attn.to_q, hidden_states, attn.norm_q), heads(attn.to_k, context, attn.norm_k)
    return DenseLayer(query, key, heads(attn.to_v, context), attn.scale)


def finished(attn: Any, attention: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """What the layer returns, from its attention [rows, H, N, E] and what it received."""
    out: torch.Tensor = attn.to_out[0](attention.transpose(1, 2).flatten(2))
    if hidden_states.ndim == 4:
        out = out.transpose(1, 2).reshape(hidden_states.shape)
    if attn.residual_connection:
        out = out + hidden_states
    scaled: torch.Tensor = out / attn.rescale_output_factor
    return scaled


def edited_map(product: Product, layer: DenseLayer) -> torch.Tensor:
    """A product's map over its values' tokens, with its weight and its mixing: [H, N, M'].

    Raises:
        NotImplementedError: the product has a field that is not written out here.
    """
    query, key, bias = _operands(product, layer)
    edited = layer.map(query, key, bias)
    if product.mixing is not None:
        edited = edited @ product.mixing.to(edited)
    return edited * _weight(product, edited)


def value_tokens(product: Product, layer: DenseLayer) -> torch.Tensor:
    """The values' tokens, one row's after the other's: [H, M', E]."""
    style = product.style if "value" in product.styled else None
    return torch.cat([_like(layer.value, row, style) for row in product.values], dim=-2)


def edited_operator(products: Sequence[Product], layer: DenseLayer) -> LinearMap:
    """The sum of some products' maps as an operator [1, H, N, M'], computed by the reference backend."""
    maps: list[LinearMap] = []
    for product in products:
        query, key, bias = _operands(product, layer)
        attention: LinearMap = AttentionMap(
            query[None], key[None], scale=layer.scale, bias=bias[None, None, None], backend="reference"
        )
        if product.mixing is not None:
            attention = attention.mix(product.mixing.to(layer.query))
        weight = product.weight
        maps.append(attention.scale_rows(weight.to(layer.query) if isinstance(weight, torch.Tensor) else weight))
    return functools.reduce(operator.add, maps)


def _operands(product: Product, layer: DenseLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [H, N, D], key [H, M, D] and what is added to the scores [M]."""
    others = [field.name for field in dataclasses.fields(product) if field.name not in WRITTEN_OUT]
    if others:
        raise NotImplementedError(f"the oracle does not write out {', '.join(others)} of a Product")
    query = product.scale * _like(layer.query, product.query, product.style if "query" in product.styled else None)
    style, scales = product.style if "key" in product.styled else None, product.scales or (1.0,) * len(product.keys)
    key = torch.cat([s * _like(layer.key, row, style) for row, s in zip(product.keys, scales, strict=True)], dim=-2)
    tokens = layer.key.shape[-2]
    shifts = product.shifts or (0.0,) * len(product.keys)
    return query, key, torch.cat([query.new_full((tokens,), shift) for shift in shifts])


def _like(rows: torch.Tensor, row: int, style: int | None) -> torch.Tensor:
    """A row [H, N, D] with another's mean and deviation over its tokens."""
    if style is None or style == row:
        return rows[row]
    given, like = rows[row], rows[style]
    centred = (given - given.mean(-2, keepdim=True)) / (given.var(-2, keepdim=True) + _EPSILON).sqrt()
    return centred * (like.var(-2, keepdim=True) + _EPSILON).sqrt() + like.mean(-2, keepdim=True)


def _weight(product: Product, like: torch.Tensor) -> torch.Tensor | float:
    """A number, or a factor for each query token, of all heads or of each: [1 | H, N, 1]."""
    weight = product.weight
    return weight.to(like)[..., None] if isinstance(weight, torch.Tensor) else weight
