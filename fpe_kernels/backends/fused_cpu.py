"""PyTorch's fused attention for CPUs, for the maps that the ``torch`` backend has nothing to add to.

A map of one batch row has nothing to share, and in a small one the calls of block-wise products take longer than the
arithmetic that sharing saves.
The operator is the one behind ``F.scaled_dot_product_attention``, called by its own name because it gives the
log-sum-exp too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Floating-point operations that sharing has to save to be worth the further calls: some 60 µs of them.
_SMALL_MAP = 9_000_000


def apply(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    by_map: Sequence[tuple[int, ...]],
    lengths: tuple[int, ...],
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
) -> Sequence[tuple[int, ...]]:
    """Write the products and the log-sum-exp of the maps served here; returns ``by_map`` without their rows."""
    if not _serves(query, key, value):
        return by_map
    a_key = 2 * query.shape[1] * query.shape[2] * query.shape[3]  # of the scores that a row shares
    served = {
        group: rows
        for group, rows in enumerate(by_map)
        if rows and (len(rows) - 1) * a_key * lengths[group] <= _SMALL_MAP
    }
    repeats = query.shape[1] // key.shape[1]
    for length in sorted({lengths[group] for group in served}):
        alike = {group: rows for group, rows in served.items() if lengths[group] == length}
        keys, values = key[:, :, :length], value[:, :, :length]
        for maps, rows in _runs(alike):
            # Of query heads that share a key head, every one is a map of its own here: views, and nothing repeated.
            for heads in (slice(first, None, repeats) for first in range(repeats)):
                own_values = values if value.shape[1] == key.shape[1] else values[:, heads]
                operands = query[:, heads], keys, own_values
                _product(*operands, maps, rows, scale, out[:, heads], logsumexp[:, heads])
    return [() if group in served else rows for group, rows in enumerate(by_map)]


def _serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's fused attention for CPUs takes these tensors, and keeps float32 statistics as exact as ours."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and value.shape[3] == query.shape[3]
        and all(tensor.stride(3) == 1 and tensor.numel() > 0 for tensor in (query, key, value))
    )


def _runs(by_map: dict[int, tuple[int, ...]]) -> list[tuple[slice, list[int]]]:
    """Maps that one call can serve, with their rows: a map with all of its rows, or neighbours with one row each.

    Threads share rows as well as heads and queries, so neighbours are faster together; and a run is a view.
    """
    runs: list[tuple[slice, list[int]]] = []
    for group, rows in by_map.items():
        if runs and len(rows) == 1:
            maps, before = runs[-1]
            if maps.stop == group and len(before) == maps.stop - maps.start and before[-1] + 1 == rows[0]:
                runs[-1] = slice(maps.start, group + 1), [*before, *rows]
                continue
        runs.append((slice(group, group + 1), list(rows)))
    return runs


def _product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    maps: slice,
    rows: list[int],
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
) -> None:
    """One call of PyTorch's fused attention for the rows of a run."""
    neighbours = rows == list(range(rows[0], rows[0] + len(rows)))
    where: slice | list[int] = slice(rows[0], rows[0] + len(rows)) if neighbours else rows
    shared = (tensor[maps].expand(len(rows), -1, -1, -1) for tensor in (query, key))
    product, statistics = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*shared, value[where], scale=scale)
    out[where] = product
    logsumexp[maps] = statistics[: maps.stop - maps.start]
