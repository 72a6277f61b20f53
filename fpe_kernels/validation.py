"""Errors that every backend shares: shapes, dtypes and devices are checked once, before any backend runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Real
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LARGEST = sys.float_info.max
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Placed(Protocol):
    """A tensor or a map: what has a dtype and a device."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


class Shaped(Placed, Protocol):
    """A map: what has a shape (B, H, N, M) beside."""

    @property
    def shape(self) -> torch.Size: ...


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32, or float64 beside float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape_of(tensor: Tensor) -> str:
    """As errors say it."""
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def check_tensor(name: str, tensor: object, layout: str) -> Tensor:
    """Check that ``tensor`` is a floating-point torch tensor of the rank that ``layout`` (``"B, H, N, D"``) names."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [{layout}], got {type(tensor).__name__}.")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense in memory, got {tensor.layout}. Convert with {name}.to_dense().")
    rank = layout.count(",") + 1
    if tensor.ndim != rank:
        raise ValueError(
            f"{name} must have {rank} dimensions [{layout}], got {tensor.ndim}: {shape_of(tensor)}. "
            "Split heads first, e.g. x.view(B, N, H, D).transpose(1, 2)."
        )
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}.")
    _refuse_transforms(name, tensor)
    return tensor


def _refuse_transforms(name: str, tensor: Tensor) -> None:
    """PyTorch's custom ops know autograd's reverse mode only; forward mode would drop the tangent without a word."""
    # A tensor has a tangent inside a dual level only, and asking outside is an error.
    inside = getattr(forward_ad, "_current_level", -1) >= 0
    if inside and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{name} has a forward-mode tangent (torch.func.jvp, torch.autograd.forward_ad), and attention maps have "
            "gradients in reverse mode only: use torch.autograd.grad or backward(), or differentiate "
            "torch.softmax(scale * query @ key.transpose(-1, -2), -1) @ value instead."
        )
    if not torch.compiler.is_compiling() and torch._C._functorch.is_gradtrackingtensor(tensor):
        raise NotImplementedError(
            f"{name} is being differentiated by a transform of torch.func (grad, vjp, jacrev, …), which cannot go "
            "through PyTorch's custom ops: use torch.autograd.grad or backward(), which give the same gradients."
        )


def check_query_key(query: object, key: object, batch: str = "B") -> tuple[Tensor, Tensor]:
    """Check the two tensors that define a map: ``query`` [B, H, N, D] and ``key`` [B, h, M, D], h a divisor of H."""
    query = check_tensor("query", query, f"{batch}, H, N, D")
    key = check_tensor("key", key, f"{batch}, H, M, D")
    check_same_place("key", key, query)
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"query and key must agree in {batch}: query has {shape_of(query)}, key has {shape_of(key)}. "
            "Expand the one that is the same for all, e.g. key.expand(len(query), -1, -1, -1)."
        )
    if key.shape[1] and query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key must have the heads of query, or a divisor of them where query heads share keys: query has "
            f"{shape_of(query)}, key has {shape_of(key)}."
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have the same head dim: got {query.shape[3]} and {key.shape[3]}.")
    if 0 in query.shape or 0 in (*key.shape[:2], key.shape[3]):
        raise ValueError(
            f"no axis of query and key but that of the keys may be empty: query {shape_of(query)}, key {shape_of(key)}."
        )
    return query, key


def check_same_place(name: str, tensor: Placed, query: Placed) -> None:
    """Check that ``tensor`` has the dtype and device of ``query``."""
    if tensor.dtype != query.dtype:
        raise TypeError(
            f"{name} must have the dtype of query: got {tensor.dtype} and {query.dtype}. "
            f"Convert with {name}.to(query.dtype)."
        )
    check_same_device(name, tensor, query)


def check_same_device(name: str, tensor: Placed, query: Placed) -> None:
    """Check that ``tensor`` has the device of ``query``."""
    if tensor.device != query.device:
        raise ValueError(
            f"{name} must be on the device of query: got {tensor.device} and {query.device}. "
            f"Move with {name}.to(query.device)."
        )


def check_value(value: object, like: Placed, shape: Sequence[int], key_heads: int | None = None) -> Tensor:
    """Check ``value`` [B, H, M, E], the right-hand side of a map of ``shape`` (B, H, N, M).

    ``key_heads`` is the number of heads that the keys have, where it is another than H: the value may have as many.
    """
    value = check_tensor("value", value, "B, H, M, E")
    check_same_place("value", value, like)
    batch, heads, _, keys = shape
    if value.shape[0] != batch:
        raise ValueError(f"value must have {batch} batch rows here, got {value.shape[0]}: {shape_of(value)}.")
    # Not by `in`: torch.compile finds a size that varies in no tuple, even where it is equal to what stands there.
    if value.shape[1] != heads and (key_heads is None or value.shape[1] != key_heads):
        shared = "" if key_heads in (None, heads) else f" or the {key_heads} of its keys"
        raise ValueError(
            f"value must have the {heads} heads of the map{shared}, got {value.shape[1]}: {shape_of(value)}."
        )
    if value.shape[2] != keys:
        raise ValueError(
            f"value must have {keys} tokens, one for each column of the map, got {value.shape[2]}: {shape_of(value)}."
        )
    return value


def check_weight(weight: object, like: Placed, shape: Sequence[int]) -> Tensor:
    """Check ``weight`` [B, H, N, E], the right-hand side of the transpose of a map of ``shape`` (B, H, N, M)."""
    weight = check_tensor("weight", weight, "B, H, N, E")
    check_same_place("weight", weight, like)
    if weight.shape[:3] != torch.Size(shape[:3]):
        raise ValueError(
            f"weight must agree with the map in [B, H, N] = {list(shape[:3])}, got {shape_of(weight)}. "
            "A.T @ weight sums over the query rows."
        )
    return weight


def _broadcasts(axes: Sequence[int], full: Sequence[int]) -> bool:
    """Whether every axis has size 1 or the whole."""
    return all(size == 1 or size == whole for size, whole in zip(axes, full, strict=True))


def _check_broadcast(name: str, tensor: object, layout: str, full: Sequence[int], like: Placed) -> Tensor:
    """Check a float tensor that broadcasts to ``full``, and give it as many axes, each of size 1 or the whole."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor that broadcasts to [{layout}], got {type(tensor).__name__}.")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}. Convert with {name}.to(query.dtype).")
    check_same_device(name, tensor, like)
    _refuse_transforms(name, tensor)
    axes = (1,) * (len(full) - tensor.ndim) + tuple(tensor.shape)
    if tensor.ndim > len(full) or not _broadcasts(axes, full):
        raise ValueError(
            f"{name} must broadcast to [{layout}] = {list(full)}, got {shape_of(tensor)}. "
            "Insert axes of size 1 where it does not vary."
        )
    return tensor.reshape(axes)


def check_row_weight(weight: object, like: Placed, shape: Sequence[int]) -> Tensor:
    """Check a weight of the query rows of a map of ``shape`` (B, H, N, M); returns it as [1 | B, 1 | H, 1 | N]."""

    def filled(name: str, number: object) -> Tensor:
        # A fill: a copy from the host would not go into a CUDA graph.
        dtype, device = accumulator_dtype(like.dtype), like.device
        return torch.full((1, 1, 1), finite_number(name, number), dtype=dtype, device=device)

    if isinstance(weight, Real) and not isinstance(weight, bool):
        return filled("weight", weight)
    if isinstance(weight, Sequence) and not isinstance(weight, (str, bytes)):
        for position, entry in enumerate(weight):
            if not isinstance(entry, Real) or isinstance(entry, bool):
                raise TypeError(f"weight[{position}] must be a number, got {entry!r}.")
        if len(weight) != shape[0]:
            raise ValueError(
                f"a list of weights has one number for each of the {shape[0]} batch rows, got {len(weight)}. "
                "For a weight of each query token pass a tensor [N]."
            )
        rows = [filled(f"weight[{position}]", entry) for position, entry in enumerate(weight)]
        return torch.cat(rows) if rows else filled("weight", 1.0)[:0]
    checked = _check_broadcast("weight", weight, "B, H, N", shape[:3], like)
    if checked.dtype not in (like.dtype, accumulator_dtype(like.dtype)):
        raise TypeError(
            f"weight must have the dtype of query or of its statistics, {like.dtype} or "
            f"{accumulator_dtype(like.dtype)}, got {checked.dtype}. Convert with weight.to(query.dtype)."
        )
    return checked


def check_column_weight(weight: object, like: Placed, shape: Sequence[int]) -> Tensor:
    """Check a weight of the columns of a map of ``shape`` (B, H, N, M); returns it as [1 | B, 1 | H, 1 | M]."""
    checked = _check_broadcast("weight", weight, "B, H, M", (*shape[:2], shape[3]), like)
    check_same_place("weight", checked, like)
    return checked


def check_mixing(matrix: object, like: Placed, shape: Sequence[int]) -> Tensor:
    """Check a matrix on the value tokens of a map of ``shape`` (B, H, N, M); returns it as [1 | B, 1 | H, M, M']."""
    if not isinstance(matrix, Tensor) or matrix.ndim < 2:
        got = shape_of(matrix) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"matrix must be a torch.Tensor [M, M'] or one that broadcasts to [B, H, M, M'], got {got}.")
    if matrix.shape[-2] != shape[3] or matrix.shape[-1] == 0:
        raise ValueError(
            f"matrix must have {shape[3]} rows, one for each column of the map, and at least one column, "
            f"got {shape_of(matrix)}. A.mix(M) @ v is A @ (M @ v); a mapper that is stored the other way is M.T."
        )
    checked = _check_broadcast("matrix", matrix, "B, H, M, M'", (*shape[:2], *matrix.shape[-2:]), like)
    check_same_place("matrix", checked, like)
    return checked


def check_same_map(first: Shaped, second: Shaped, batch: bool = True) -> None:
    """Check that two maps can be added; or, without ``batch``, stand one after the other along the batch."""
    start = 0 if batch else 1
    if first.shape[start:] != second.shape[start:]:
        raise ValueError(
            f"maps must agree in {'[B, H, N, M]' if batch else '[H, N, M]'}: got {list(first.shape)} and "
            f"{list(second.shape)}. Gather batch rows with A.take(index), bring other tokens together with A.mix(M)."
        )
    check_same_place("the second map", second, first)


def check_same_rows(first: Shaped, second: Shaped) -> None:
    """Check that two maps have the same query rows."""
    if first.shape[:3] != second.shape[:3]:
        raise ValueError(
            f"maps must agree in [B, H, N]: got {list(first.shape)} and {list(second.shape)}. Gather batch rows with "
            "A.take(index), query rows with A.queries(start, stop)."
        )
    check_same_place("the second map", second, first)


def check_same_columns(first: Shaped, second: Shaped) -> None:
    """Check that two maps have the same batch, heads and keys."""
    if (*first.shape[:2], first.shape[3]) != (*second.shape[:2], second.shape[3]):
        raise ValueError(
            f"maps must agree in [B, H] and M: got {list(first.shape)} and {list(second.shape)}. Gather batch rows "
            "with A.take(index), bring other tokens together with A.mix(M)."
        )
    check_same_place("the second map", second, first)


def check_bias(bias: object, query: Tensor, key: Tensor) -> Tensor | None:
    """Check an additive bias and give it four axes, each of size 1 or that of [B, H, N, M]."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a torch.Tensor or None, got {type(bias).__name__}.")
    if bias.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"bias is additive and must be floating point, got {bias.dtype}. Convert a boolean mask (True = attend) "
            "with torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, float('-inf'))."
        )
    check_same_place("bias", bias, query)
    _refuse_transforms("bias", bias)
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    axes = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if bias.ndim > 4 or not _broadcasts(axes, full):
        raise ValueError(
            f"bias must broadcast to [B, H, N, M] = {list(full)}, got {shape_of(bias)}. "
            "Insert axes of size 1 where it does not vary."
        )
    return bias.reshape(axes)


def finite_number(name: str, number: object) -> float:
    """A real number as a float; ValueError for NaN, infinities and numbers beyond any float."""
    # Comparisons are false for NaN, and can be traced where torch.compile makes a symbol of a number that varies.
    if not -_LARGEST <= cast(float, number) <= _LARGEST:
        got = number if isinstance(number, float) else f"a number of type {type(number).__name__} beyond any float"
        raise ValueError(f"{name} must be finite, got {got}.")
    return float(cast(float, number))


def check_scale(scale: object, head_dim: int) -> float:
    """Return the softmax scale; None means ``head_dim ** -0.5``."""
    if scale is None:
        factor: float = head_dim**-0.5
        return factor
    if not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}.")
    return finite_number("scale", scale)


def check_logsumexp(logsumexp: object, query: Tensor) -> Tensor:
    """Check a known log-sum-exp [B, H, N] against ``query`` [B, H, N, D]."""
    expected = accumulator_dtype(query.dtype)
    if not isinstance(logsumexp, Tensor):
        raise TypeError(f"logsumexp must be a torch.Tensor [B, H, N], got {type(logsumexp).__name__}.")
    if logsumexp.shape != query.shape[:3]:
        raise ValueError(
            f"logsumexp must be [B, H, N] = {shape_of(query[..., 0])}, got {shape_of(logsumexp)}. "
            "Take it from A.logsumexp."
        )
    if logsumexp.dtype != expected or logsumexp.device != query.device:
        raise ValueError(
            f"logsumexp must be {expected} on {query.device}, got {logsumexp.dtype} on {logsumexp.device}. "
            "Statistics are never kept in half precision."
        )
    return logsumexp
