"""PyTorch's fused attention for CPUs, for the maps that the ``torch`` backend has nothing to add to.

A map of one batch row has nothing to share, and in a tiny one the calls of block-wise products take longer than the
arithmetic that sharing saves.
The operator is the one behind ``F.scaled_dot_product_attention``, called by its own name because it gives the
log-sum-exp too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Floating-point operations that sharing has to save to be worth the further calls: some 10 µs of one thread. Where
# several threads share the operations of a call they compute faster, and wait for one another in each further one.
_SMALL_MAP, _SMALL_MAP_OF_THREADS = 1_000_000, 8_000_000
# As many as the widest vector holds. Of fewer keys PyTorch's operator takes a query that is not a number for one that
# is masked throughout: its row is zero, and nobody hears of it.
_LEAST_KEYS = 16

_flash: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_by_name: Callable[[], bool] = torch.backends.cuda.flash_sdp_enabled  # PyTorch's setting for this operator, on CPUs too


class Run(NamedTuple):
    """What one call serves: maps that are neighbours, the batch rows that name them, some heads."""

    maps: slice
    rows: slice | list[int]
    row_count: int
    length: int  # of every map's keys
    heads: slice
    value_heads: slice
    everything: bool  # one map and all there is: nothing to cut out, and in a small product the calls that cut count


def runs(
    query: Tensor, key: Tensor, value: Tensor, by_map: Sequence[tuple[int, ...]], lengths: tuple[int, ...]
) -> tuple[list[Run], Sequence[tuple[int, ...]]]:
    """The calls for the maps served here, which follow from layouts; and ``by_map`` without their rows."""
    if not _serves(query, key, value):
        return [], by_map
    a_key = 2 * query.shape[1] * query.shape[2] * query.shape[3]  # of the scores that a row shares
    small = _SMALL_MAP if torch.get_num_threads() == 1 else _SMALL_MAP_OF_THREADS
    served = {
        group: rows
        for group, rows in enumerate(by_map)
        if rows and lengths[group] >= _LEAST_KEYS and (len(rows) - 1) * a_key * lengths[group] <= small
    }
    repeats = query.shape[1] // key.shape[1]
    found = []
    for length in sorted({lengths[group] for group in served}):
        alike = {group: rows for group, rows in served.items() if lengths[group] == length}
        for maps, rows in _neighbours(alike):
            where: slice | list[int] = rows
            if rows == list(range(rows[0], rows[0] + len(rows))):
                where = slice(rows[0], rows[0] + len(rows))
            # Of query heads that share a key head, every one is a map of its own here: views, and nothing repeated.
            for heads in (slice(first, None, repeats) for first in range(repeats)):
                own_heads = slice(None) if value.shape[1] == key.shape[1] else heads
                everything = (
                    query.shape[0] == 1
                    and repeats == 1
                    and where == slice(0, value.shape[0])
                    and length == key.shape[2] == value.shape[2]
                )
                found.append(Run(maps, where, len(rows), length, heads, own_heads, everything))
    return found, [() if group in served else rows for group, rows in enumerate(by_map)]


def product(run: Run, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The products of a run [rows, heads, N, D], in memory [rows, N, heads, D], and the log-sum-exp of its rows."""
    if run.everything:
        several = run.row_count, -1, -1, -1
        return _flash(query.expand(several), key.expand(several), value, scale=scale)
    keys = slice(run.length)
    return _flash(
        query[run.maps, run.heads].expand(run.row_count, -1, -1, -1),
        key[run.maps, :, keys].expand(run.row_count, -1, -1, -1),
        value[run.rows, run.value_heads, keys],
        scale=scale,
    )


def whole_product(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The products of the only map with all rows [rows, heads, N, D].

    By the operator's other name, for which Python does less: in a small map that counts. Where the user has turned it
    off, in a block of ``sdpa_kernel`` say, that name stands for another operator, or for none.
    """
    rows = value.shape[0], -1, -1, -1
    if not _by_name():
        return _flash(query.expand(rows), key.expand(rows), value, scale=scale)[0]
    return F.scaled_dot_product_attention(query.expand(rows), key.expand(rows), value, scale=scale)


def write_product(
    run: Run, query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, logsumexp: Tensor | None
) -> None:
    """Write the products of a run, and its log-sum-exp where that is wanted."""
    part, statistics = product(run, query, key, value, scale)
    out[run.rows, run.heads] = part
    if logsumexp is not None:
        logsumexp[run.maps, run.heads] = statistics[: run.maps.stop - run.maps.start]


def _serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's fused attention for CPUs takes these tensors, and keeps float32 statistics as exact as ours."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and value.shape[3] == query.shape[3]
        and all(tensor.stride(3) == 1 and tensor.numel() > 0 for tensor in (query, key, value))
    )


def _neighbours(by_map: dict[int, tuple[int, ...]]) -> list[tuple[slice, list[int]]]:
    """Maps that one call can serve, with their rows: a map with all of its rows, or neighbours with one row each.

    Threads share rows as well as heads and queries, so neighbours are faster together; and a run is a view.
    """
    found: list[tuple[slice, list[int]]] = []
    for group, rows in by_map.items():
        if found and len(rows) == 1:
            maps, before = found[-1]
            if maps.stop == group and len(before) == maps.stop - maps.start and before[-1] + 1 == rows[0]:
                found[-1] = slice(maps.start, group + 1), [*before, *rows]
                continue
        found.append((slice(group, group + 1), list(rows)))
    return found
