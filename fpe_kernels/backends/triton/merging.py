"""The product over some keys, merged with that over others before it is rounded: the last part of a joined map.

The part that most rows share goes first, into float32, for all of them at once; the small private part follows, and
takes the other's product up where its own accumulators lie. So the private product is never written in float32, and
what merging reads and writes is one float32 product and the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from . import apply as pointers
from . import configs
from .configs import Config
from .launch import Launch, product_precision
from .packing import chunks, columns_of
from .plans import launch_all

MAX_MERGED_COLUMNS = 160
"""Packed columns of one launch: a tile of the other product wants registers beside the accumulators."""


def apply_merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    map_index: tuple[int, ...],
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
    known: bool,
    row_weight: Tensor | None,
    key_lengths: tuple[int, ...] | None,
    prior: Tensor,
    prior_logsumexp: Tensor,
) -> None:
    """As ``apply``, merged with ``prior`` [B, H, N, E] over other keys; ``logsumexp`` is that of these keys."""
    logsumexp = logsumexp.contiguous() if known else logsumexp
    if prior.stride() != out.stride():
        prior = out.new_empty(out.shape, dtype=prior.dtype).as_strided(out.shape, out.stride()).copy_(prior)
    tensors = query, key, value, bias, out, logsumexp, row_weight, prior, prior_logsumexp.contiguous()
    launch_all(plan, tensors, map_index, scale, known, configs.pointer_config, key_lengths)


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    row_weight: Tensor | None,
    prior: Tensor,
    prior_logsumexp: Tensor,
    map_index: tuple[int, ...],
    scale: float,
    known: bool,
    pointer_config: Callable[..., Config],
    key_lengths: tuple[int, ...] | None,
) -> Iterator[Launch]:
    """The launches of :func:`apply_merged`, by the rule given."""
    if bias is not None:
        bias = bias.expand(*query.shape[:3], key.shape[2])
    if row_weight is not None:
        row_weight = row_weight.expand(out.shape[:3])
    tf32 = product_precision(query.dtype) == "tf32"
    for chunk in chunks(map_index, query.shape[0], value.shape[3], MAX_MERGED_COLUMNS):
        values = columns_of(value, chunk)
        yield pointers.prepare(
            query,
            key,
            values,
            bias,
            chunk,
            scale,
            columns_of(out, chunk),
            logsumexp,
            known or not chunk.first,
            row_weight,
            # Rows without a weight here have one in the other product's statistics.
            False,
            pointer_config(query, values, chunk, bias is not None, tf32),
            key_lengths,
            columns_of(prior, chunk),
            prior_logsumexp,
        )
