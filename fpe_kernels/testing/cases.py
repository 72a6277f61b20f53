"""The inputs of every operator, and every result of them by dense equations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import validation
from ..backends import reference
from .layouts import generator, make


@dataclass(frozen=True)
class Case:
    """The inputs of every operator of :mod:`fpe_kernels.ops`.

    Args:
        query: [G, H, N, D].
        key: [G, h, M, D]; query heads may share key heads.
        value: [B, h, M, E]; the same.
        map_index: the map of each batch row.
        bias: [g, h, n, m], each axis whole or 1; None for none.
        scale: None means ``D ** -0.5``.
        weight: [B, H, N, E], the operand of the adjoint and the gradient of the output.
        row_weight: [b, h, n], each axis whole or 1: weights of the rows of the product; None for ones.
        key_lengths: the keys of each map that exist; None for all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    map_index: tuple[int, ...]
    bias: Tensor | None = None
    scale: float | None = None
    row_weight: Tensor | None = None
    key_lengths: tuple[int, ...] | None = None

    @property
    def factor(self) -> float:
        """The scale as a number."""
        return validation.check_scale(self.scale, self.query.shape[-1])

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype; widening is exact."""
        converted: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, one in converted.items():
            converted[name] = one.to(dtype) if isinstance(one, Tensor) else one
        return Case(**converted)

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """Every result in float64, by the equations."""
        return results_of(self.to(torch.float64))

    @cached_property
    def plain(self) -> dict[str, Tensor]:
        """Every result by plain PyTorch at the dtype of the inputs; the log-sum-exp at that of the statistics."""
        plain = results_of(self)
        if plain["logsumexp"].dtype != validation.accumulator_dtype(self.query.dtype):
            plain["logsumexp"] = results_of(self.to(torch.float32))["logsumexp"]
        return plain

    @cached_property
    def magnitude(self) -> dict[str, float]:
        """For every result, the largest sum of absolute values that any element is made of."""
        return _magnitudes(self.to(torch.float64))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a seeded :class:`Case` is like.

    Args:
        maps: G; ``map_index`` is one batch row for each map unless given.
        heads, queries, keys, head_dim: H, N, M and D.
        value_dim: E; None means ``head_dim``.
        dtype, device: of every tensor.
        layout: of query, key, value and weight: one name for all four, or four names.
        bias: for each of the axes [G, H, N, M], whether it varies; None for no bias.
        masked: share of the bias that is -inf.
        scale: of the scores; None means ``D ** -0.5``.
        amplitude: standard deviation of query and key.
        row_weight: for each of the axes [B, H, N], whether it varies; None for no weights.
        unweighted: share of the row weights that is zero.
        key_heads, value_heads: heads of key and of value; None means ``heads``.
        key_lengths: the keys of each map that exist; None for all.
    """

    maps: int = 1
    map_index: Sequence[int] | None = None
    heads: int = 2
    queries: int = 16
    keys: int = 16
    head_dim: int = 16
    value_dim: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    layout: str | Sequence[str] = "contiguous"
    bias: Sequence[bool] | None = None
    masked: float = 0.0
    scale: float | None = None
    amplitude: float = 1.0
    row_weight: Sequence[bool] | None = None
    unweighted: float = 0.3
    key_heads: int | None = None
    value_heads: int | None = None
    key_lengths: Sequence[int] | None = None

    def case(self, seed: int) -> Case:
        """The case of a seed."""
        index = tuple(range(self.maps) if self.map_index is None else self.map_index)
        rows, heads, keys = len(index), self.heads, self.keys
        of_query, of_key, of_value, of_weight = (self.layout,) * 4 if isinstance(self.layout, str) else self.layout
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        query = (self.maps, heads, self.queries, self.head_dim)
        key = (self.maps, self.key_heads or heads, keys, self.head_dim)
        return Case(
            self._made(query, seed, of_query, self.amplitude),
            self._made(key, seed + 1, of_key, self.amplitude),
            self._made((rows, self.value_heads or heads, keys, value_dim), seed + 2, of_value),
            self._made((rows, heads, self.queries, value_dim), seed + 3, of_weight),
            index,
            self._broadcast(self.bias, (self.maps, heads, self.queries, keys), seed + 4, self.masked, float("-inf")),
            self.scale,
            self._broadcast(self.row_weight, (rows, heads, self.queries), seed + 5, self.unweighted, 0.0),
            None if self.key_lengths is None else tuple(self.key_lengths),
        )

    def _made(self, shape: tuple[int, ...], seed: int, layout: str, amplitude: float = 1.0) -> Tensor:
        return make(shape, seed, self.dtype, self.device, layout, amplitude)

    def _broadcast(
        self, varies: Sequence[bool] | None, full: tuple[int, ...], seed: int, share: float, filling: float
    ) -> Tensor | None:
        """Random numbers in the axes that vary, a share of which is ``filling``."""
        if varies is None:
            return None
        rng = generator(seed)
        shape = [size if here else 1 for size, here in zip(full, varies, strict=True)]
        numbers = torch.randn(shape, generator=rng)
        numbers = numbers.masked_fill(torch.rand(shape, generator=rng) < share, filling)
        return numbers.to(device=self.device, dtype=self.dtype)


def make_case(seed: int = 0, **recipe: Any) -> Case:
    """A seeded :class:`Case`.

    Args:
        seed: of its numbers.
        **recipe: fields of :class:`Recipe`.

    Raises:
        TypeError: what is no field of it.
    """
    return Recipe(**recipe).case(seed)


def causal_bias(queries: int, keys: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """[N, M]: 0 where key m ≤ query n, -inf elsewhere; with more keys than queries no row is masked throughout."""
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill(~allowed, float("-inf"))


def padding_bias(lengths: Sequence[int], keys: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """[G, 1, 1, M]: 0 for the first ``lengths[g]`` keys, -inf for the padding; length 0 masks whole rows."""
    position = torch.arange(keys, device=device)
    padded = position >= torch.tensor(lengths, device=device).unsqueeze(1)
    bias = torch.zeros(padded.shape, dtype=dtype, device=device).masked_fill(padded, float("-inf"))
    return bias[:, None, None, :]


RESULTS = ("out", "logsumexp", "adjoint", "grad_query", "grad_key", "grad_value", "grad_bias", "grad_row_weight")


def results_of(case: Case) -> dict[str, Tensor]:
    """Every result of ``case`` by dense equations at its own dtype; the gradients are those of ⟨out, weight⟩."""
    query, heads, bias = case.query, case.query.shape[1], case.bias
    key, value = (reference.repeated(tensor, heads) for tensor in (case.key, case.value))
    index = list(case.map_index)
    maps, logsumexp = reference.attention_map(query, key, bias, case.factor, case.key_lengths)
    product = maps[index] @ value
    adjoint = maps[index].transpose(-1, -2) @ case.weight
    rows = _row_weight(case)
    outer = (rows * case.weight) @ value.transpose(-1, -2)
    outer = torch.zeros_like(maps).index_add_(0, torch.tensor(index, device=maps.device, dtype=torch.int64), outer)
    scores = maps * (outer - (maps * outer).sum(-1, keepdim=True))
    results = {
        "out": rows * product,
        "logsumexp": logsumexp,
        "adjoint": adjoint,
        "grad_query": case.factor * (scores @ key),
        "grad_key": _shared(case.factor * (scores.transpose(-1, -2) @ query), case.key),
        "grad_value": _shared(maps[index].transpose(-1, -2) @ (rows * case.weight), case.value),
    }
    if bias is not None:
        results["grad_bias"] = scores.sum_to_size(bias.shape)
    if case.row_weight is not None:
        results["grad_row_weight"] = (case.weight * product).sum(-1).sum_to_size(case.row_weight.shape)
    return results


def _shared(by_head: Tensor, like: Tensor) -> Tensor:
    """[B, H, L, E] summed over the query heads that share one of ``like``."""
    return by_head if by_head.shape[1] == like.shape[1] else by_head.unflatten(1, (like.shape[1], -1)).sum(2)


def _row_weight(case: Case) -> Tensor:
    """[b, h, n, 1]."""
    return torch.ones_like(case.value[:1, :1, :1, :1]) if case.row_weight is None else case.row_weight.unsqueeze(-1)


def _magnitudes(case: Case) -> dict[str, float]:
    """The equations of :func:`results_of` with every term replaced by its absolute value."""
    index, heads = list(case.map_index), case.query.shape[1]
    key, value = (reference.repeated(tensor, heads).abs() for tensor in (case.key, case.value))
    maps, _ = reference.attention_map(case.query, case.key, case.bias, case.factor, case.key_lengths)
    rows, product = _row_weight(case).abs(), maps[index] @ value
    outer = (rows * case.weight.abs()) @ value.transpose(-1, -2)
    outer = torch.zeros_like(maps).index_add_(0, torch.tensor(index, device=maps.device, dtype=torch.int64), outer)
    scores = maps * (outer + (maps * outer).sum(-1, keepdim=True))
    factor = abs(case.factor)
    magnitudes = {
        "out": rows * product,
        "logsumexp": torch.ones(1),
        "adjoint": maps[index].transpose(-1, -2) @ case.weight.abs(),
        "grad_query": factor * (scores @ key),
        "grad_key": _shared(factor * (scores.transpose(-1, -2) @ case.query.abs()), case.key),
        "grad_value": _shared(maps[index].transpose(-1, -2) @ (rows * case.weight.abs()), case.value),
    }
    if case.bias is not None:
        magnitudes["grad_bias"] = scores.sum_to_size(case.bias.shape)
    if case.row_weight is not None:
        magnitudes["grad_row_weight"] = (case.weight.abs() * product).sum(-1).sum_to_size(case.row_weight.shape)
    return {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in magnitudes.items()}


def score_magnitude(case: Case) -> float:
    """The largest Σ_d |scale · q · k| + |bias| over the scores that are not masked, and the largest |log-sum-exp|.

    A probability is exp(score − log-sum-exp): the rounding of either is a relative error of the probability.
    """
    wide = case.to(torch.float64)
    key = reference.repeated(wide.key.abs(), wide.query.shape[1])
    terms = abs(case.factor) * (wide.query.abs() @ key.transpose(-1, -2))
    if wide.bias is not None:
        terms = torch.where(wide.bias.isneginf(), 0.0, terms + wide.bias.abs())
    statistics = case.exact["logsumexp"].detach()
    statistics = statistics[statistics.isfinite()]
    return float(terms.detach().max()) + (float(statistics.abs().max()) if statistics.numel() else 0.0)
