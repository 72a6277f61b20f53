"""Inputs and the error budget that every test and every benchmark shares.

Inputs are seeded and come in the memory layouts that attention processors make. Results are judged by one rule, that of
FlashAttention's tests: the error of a kernel is at most twice the error of plain PyTorch at the same dtype, plus one
rounding band, both against float64. No test brings a tolerance of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import validation
from .backends import reference
from .backends.grouping import rows_by_map

Shape = tuple[int, int, int, int]


def generator(seed: int) -> torch.Generator:
    """A CPU generator: the same seed gives the same numbers whatever device the tensors move to."""
    return torch.Generator().manual_seed(seed)


# -- memory layouts ---------------------------------------------------------------------------------------------------


def _contiguous(shape: Shape, rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng)


def _heads_split(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, heads, tokens, dim = shape
    return torch.randn(batch, tokens, heads * dim, generator=rng).view(batch, tokens, heads, dim).transpose(1, 2)


def _fused_chunk(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, heads, tokens, dim = shape
    chunk = torch.randn(batch, tokens, 3 * heads * dim, generator=rng).chunk(3, dim=-1)[1]
    return chunk.unflatten(-1, (heads, dim)).transpose(1, 2)


def _fused_heads(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, heads, tokens, dim = shape
    return torch.randn(batch, tokens, heads, 3 * dim, generator=rng)[..., dim : 2 * dim].transpose(1, 2)


def _batch_expanded(shape: Shape, rng: torch.Generator) -> Tensor:
    return torch.randn(1, *shape[1:], generator=rng).expand(shape)


def _heads_expanded(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, _, tokens, dim = shape
    return torch.randn(batch, 1, tokens, dim, generator=rng).expand(shape)


def _batch_sliced(shape: Shape, rng: torch.Generator) -> Tensor:
    return _heads_split((2 * shape[0] + 1, *shape[1:]), rng)[1::2]


def _tokens_sliced(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, heads, tokens, dim = shape
    return _heads_split((batch, heads, 2 * tokens + 1, dim), rng)[:, :, 1::2]


def _entries_sliced(shape: Shape, rng: torch.Generator) -> Tensor:
    return torch.randn(*shape[:3], 2 * shape[3], generator=rng)[..., ::2]


def _channels_first(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, heads, tokens, dim = shape
    return torch.randn(batch, heads, dim, tokens, generator=rng).transpose(2, 3)


def _misaligned(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, heads, tokens, dim = shape
    return torch.randn(batch * heads * tokens * dim + 1, generator=rng)[1:].view(shape)


LAYOUTS: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "contiguous": _contiguous,
    "heads_split": _heads_split,  # a projection, view and transpose
    "fused_chunk": _fused_chunk,  # one third of a fused qkv projection, q | k | v
    "fused_heads": _fused_heads,  # the same with q | k | v inside every head
    "batch_expanded": _batch_expanded,
    "heads_expanded": _heads_expanded,
    "batch_sliced": _batch_sliced,  # every second row of a batch
    "tokens_sliced": _tokens_sliced,
    "entries_sliced": _entries_sliced,  # neighbours are two elements apart
    "channels_first": _channels_first,  # a 1 × 1 convolution as projection
    "misaligned": _misaligned,  # starts one element past an aligned address
}


def make(
    shape: Sequence[int],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "contiguous",
    amplitude: float = 1.0,
) -> Tensor:
    """A seeded normal tensor [B, H, L, D] with the strides of ``layout``, a key of :data:`LAYOUTS`.

    Equivalent PyTorch, up to strides::

        amplitude * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    """
    batch, heads, tokens, dim = shape
    tensor = LAYOUTS[layout]((batch, heads, tokens, dim), generator(seed))
    # Through the whole storage, so that conversion and movement keep strides, overlaps and the offset.
    storage = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    moved = (storage * amplitude).to(device=device, dtype=dtype)
    return moved.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


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


# -- the error budget -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The inputs of every operator of :mod:`fpe_kernels.ops`.

    Args:
        query, key: [G, H, N | M, D].
        value: [B, H, M, E].
        map_index: the map of each batch row.
        bias: [g, h, n, m], each axis whole or 1; None for none.
        scale: None means ``D ** -0.5``.
        weight: [B, H, N, E], the operand of the adjoint and the gradient of the output.
        row_weight: [b, h, n], each axis whole or 1: weights of the rows of the product; None for ones.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    map_index: tuple[int, ...]
    bias: Tensor | None = None
    scale: float | None = None
    row_weight: Tensor | None = None

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


RESULTS = ("out", "logsumexp", "adjoint", "grad_query", "grad_key", "grad_value", "grad_bias", "grad_row_weight")


def results_of(case: Case) -> dict[str, Tensor]:
    """Every result of ``case`` by dense equations at its own dtype; the gradients are those of ⟨out, weight⟩."""
    query, key, bias = case.query, case.key, case.bias
    index = list(case.map_index)
    maps, logsumexp = reference.attention_map(query, key, bias, case.factor)
    product = maps[index] @ case.value
    adjoint = maps[index].transpose(-1, -2) @ case.weight
    rows = _row_weight(case)
    outer = (rows * case.weight) @ case.value.transpose(-1, -2)
    outer = torch.zeros_like(maps).index_add_(0, torch.tensor(index, device=maps.device, dtype=torch.int64), outer)
    scores = maps * (outer - (maps * outer).sum(-1, keepdim=True))
    results = {
        "out": rows * product,
        "logsumexp": logsumexp,
        "adjoint": adjoint,
        "grad_query": case.factor * (scores @ key),
        "grad_key": case.factor * (scores.transpose(-1, -2) @ query),
        "grad_value": maps[index].transpose(-1, -2) @ (rows * case.weight),
    }
    if bias is not None:
        results["grad_bias"] = scores.sum_to_size(bias.shape)
    if case.row_weight is not None:
        results["grad_row_weight"] = (case.weight * product).sum(-1).sum_to_size(case.row_weight.shape)
    return results


def _row_weight(case: Case) -> Tensor:
    """[b, h, n, 1]."""
    return torch.ones_like(case.value[:1, :1, :1, :1]) if case.row_weight is None else case.row_weight.unsqueeze(-1)


def _magnitudes(case: Case) -> dict[str, float]:
    """The equations of :func:`results_of` with every term replaced by its absolute value."""
    index = list(case.map_index)
    maps, _ = reference.attention_map(case.query, case.key, case.bias, case.factor)
    rows, product = _row_weight(case).abs(), maps[index] @ case.value.abs()
    outer = (rows * case.weight.abs()) @ case.value.abs().transpose(-1, -2)
    outer = torch.zeros_like(maps).index_add_(0, torch.tensor(index, device=maps.device, dtype=torch.int64), outer)
    scores = maps * (outer + (maps * outer).sum(-1, keepdim=True))
    factor = abs(case.factor)
    magnitudes = {
        "out": rows * product,
        "logsumexp": torch.ones(1),
        "adjoint": maps[index].transpose(-1, -2) @ case.weight.abs(),
        "grad_query": factor * (scores @ case.key.abs()),
        "grad_key": factor * (scores.transpose(-1, -2) @ case.query.abs()),
    }
    magnitudes["grad_value"] = maps[index].transpose(-1, -2) @ (rows * case.weight.abs())
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
    terms = abs(case.factor) * (wide.query.abs() @ wide.key.abs().transpose(-1, -2))
    if wide.bias is not None:
        terms = torch.where(wide.bias.isneginf(), 0.0, terms + wide.bias.abs())
    statistics = case.exact["logsumexp"].detach()
    statistics = statistics[statistics.isfinite()]
    return float(terms.detach().max()) + (float(statistics.abs().max()) if statistics.numel() else 0.0)


def rounding_band(dtype: torch.dtype, magnitude: float, scores: float) -> float:
    """What one rounding of each kind may cost a result whose terms add up to ``magnitude``.

    Operands, probabilities and outputs are rounded to ``dtype``; scores, whose terms add up to ``scores``, to the dtype
    of the statistics, and an error of a score is a relative error of a probability.
    """
    statistics = validation.accumulator_dtype(dtype)
    relative = torch.finfo(dtype).eps + torch.finfo(statistics).eps * (1.0 + scores)
    return relative * magnitude + torch.finfo(dtype).smallest_normal


def worst_error(actual: Tensor, exact: Tensor) -> float:
    """max |actual − exact|, infinite where a value is NaN or an infinity stands on one side only."""
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} where {tuple(exact.shape)} was expected")
    actual, exact = actual.detach().to(torch.float64), exact.to(torch.float64)
    if actual.numel() == 0:
        return 0.0
    error = torch.where(actual == exact, 0.0, (actual - exact).abs())
    return float(error.nan_to_num(nan=float("inf")).max())


def error_budget(
    plain: Tensor, exact: Tensor, dtype: torch.dtype, magnitude: float | None = None, scores: float = 0.0
) -> float:
    """The error that a result of ``dtype`` may have: 2 × that of plain PyTorch, plus one rounding band.

    Args:
        plain: the result of plain PyTorch at ``dtype``.
        exact: the result in float64.
        dtype: of the inputs.
        magnitude: sum of the absolute values of the terms of an element; None takes the largest |exact|.
        scores: the same for the scores that the result depends on.
    """
    if magnitude is None:
        finite = exact[exact.isfinite()]
        magnitude = float(finite.abs().max()) if finite.numel() else 0.0
    band = rounding_band(dtype, magnitude, scores)
    # At float64 plain PyTorch is the oracle itself, rounding and all: its error is unknown, and counts as one band.
    error = band if dtype == torch.float64 else worst_error(plain, exact)
    # Half precision overflows in plain PyTorch where a fused kernel must not: such an error allows nothing.
    return 2.0 * (error if error < float("inf") else 0.0) + band


def assert_within_budget(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    magnitude: float | None = None,
    scores: float = 0.0,
    name: str = "result",
) -> None:
    """Raise AssertionError if ``actual`` is farther from ``exact`` than :func:`error_budget` allows."""
    error, budget = worst_error(actual, exact), error_budget(plain, exact, dtype, magnitude, scores)
    if not error <= budget:
        raise AssertionError(f"{name}: error {error:.3e} against float64 passes the budget of {budget:.3e} ({dtype})")


def assert_matches(case: Case, **actual: Tensor) -> None:
    """Check results of ``case``, named as in :data:`RESULTS`, against the budget; maps that no row names are left out.

    >>> case = make_case(seed=1)
    >>> assert_matches(case, out=results_of(case)["out"])
    """
    groups = [group for group, rows in enumerate(rows_by_map(case.map_index, case.query.shape[0])) if rows]
    scores = score_magnitude(case)
    for name, tensor in actual.items():
        exact, plain = case.exact[name], case.plain[name]
        if name == "logsumexp":
            # Nothing computes the statistics of a map that no row names.
            tensor, exact, plain = tensor[groups], exact[groups], plain[groups]
            dtype = validation.accumulator_dtype(case.query.dtype)
        else:
            dtype = case.query.dtype
        assert_within_budget(tensor, plain, exact, dtype, case.magnitude[name], scores, name)


def make_case(
    seed: int = 0,
    *,
    maps: int = 1,
    map_index: Sequence[int] | None = None,
    heads: int = 2,
    queries: int = 16,
    keys: int = 16,
    head_dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str | Sequence[str] = "contiguous",
    bias: Sequence[bool] | None = None,
    masked: float = 0.0,
    scale: float | None = None,
    amplitude: float = 1.0,
    row_weight: Sequence[bool] | None = None,
    unweighted: float = 0.3,
) -> Case:
    """A seeded :class:`Case`.

    Args:
        maps: G; ``map_index`` is one batch row for each map unless given.
        value_dim: E; None means ``head_dim``.
        layout: of query, key, value and weight: one name for all four, or four names.
        bias: for each of the axes [G, H, N, M], whether it varies; None for no bias.
        masked: share of the bias that is -inf.
        amplitude: standard deviation of query and key.
        row_weight: for each of the axes [B, H, N], whether it varies; None for no weights.
        unweighted: share of the row weights that is zero.
    """
    index = tuple(range(maps) if map_index is None else map_index)
    names = (layout,) * 4 if isinstance(layout, str) else tuple(layout)
    value_dim = head_dim if value_dim is None else value_dim
    additive = None
    if bias is not None:
        rng = generator(seed + 4)
        shape = [size if varies else 1 for size, varies in zip((maps, heads, queries, keys), bias, strict=True)]
        additive = torch.randn(shape, generator=rng)
        additive = additive.masked_fill(torch.rand(shape, generator=rng) < masked, float("-inf"))
        additive = additive.to(device=device, dtype=dtype)
    weights = None
    if row_weight is not None:
        rng = generator(seed + 5)
        full = (len(index), heads, queries)
        axes = [size if varies else 1 for size, varies in zip(full, row_weight, strict=True)]
        weights = torch.randn(axes, generator=rng)
        weights = weights.masked_fill(torch.rand(axes, generator=rng) < unweighted, 0.0).to(device=device, dtype=dtype)
    return Case(
        make((maps, heads, queries, head_dim), seed, dtype, device, names[0], amplitude),
        make((maps, heads, keys, head_dim), seed + 1, dtype, device, names[1], amplitude),
        make((len(index), heads, keys, value_dim), seed + 2, dtype, device, names[2]),
        make((len(index), heads, queries, value_dim), seed + 3, dtype, device, names[3]),
        index,
        additive,
        scale,
        weights,
    )
