"""The forward product, launch by launch: which maps share one, which columns, which kernel, which configuration.

Maps with unequal numbers of batch rows (a guided batch, whose unconditional rows have maps of their own) take a launch
for each number, or one together, as wide as the widest: :func:`.configs.one_launch` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from ..grouping import rows_by_map
from . import apply as pointers
from . import boxes, configs, hopper
from .configs import MAX_COLUMNS, Config
from .launch import Launch, product_precision
from .packing import chunks, columns_of
from .plans import launch_all


def apply(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    map_index: tuple[int, ...],
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
    known: bool,
    row_weight: Tensor | None = None,
    key_lengths: tuple[int, ...] | None = None,
) -> None:
    """Write ``row_weight ⊙ (A[map_index] @ value)`` to ``out`` and, unless it is known, the log-sum-exp."""
    logsumexp = logsumexp.contiguous() if known else logsumexp
    tensors = query, key, value, bias, out, logsumexp, row_weight
    launch_all(plan, tensors, map_index, scale, known, configs.one_launch, configs.apply_config, key_lengths)


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    row_weight: Tensor | None,
    map_index: tuple[int, ...],
    scale: float,
    known: bool,
    one_launch: Callable[..., bool],
    apply_config: Callable[..., Config],
    key_lengths: tuple[int, ...] | None = None,
) -> Iterator[Launch]:
    """The launches of :func:`apply`, by the two rules given."""
    if bias is not None:
        bias = bias.expand(*query.shape[:3], key.shape[2])
    if row_weight is not None:
        row_weight = row_weight.expand(out.shape[:3])
    rows = rows_by_map(map_index, query.shape[0])
    tf32 = product_precision(query.dtype) == "tf32"
    together = one_launch(query, value, map_index, bias is not None)
    for chunk in chunks(map_index, query.shape[0], value.shape[3], MAX_COLUMNS[query.element_size()], together):
        values = columns_of(value, chunk)
        config = apply_config(query, values, chunk, bias is not None, tf32)
        known_here = known or not chunk.first
        outs = columns_of(out, chunk)
        # What has fewer keys for some maps, or fewer heads of keys or values, is of the general kernel.
        whole = key_lengths is None and query.shape[1] == key.shape[1] == value.shape[1]
        plain = whole and bias is None and row_weight is None
        # The kernel for Hopper writes float32 too, but no measured row shows that on a device yet.
        proven = out.dtype == value.dtype
        if config.gluon and plain and proven and not hopper.refusal(query, key, values, chunk, scale, config):
            yield from hopper.launches(query, key, values, chunk, scale, outs, logsumexp, known_here, config)
            continue
        plain = plain and not known_here
        if config.descriptors and plain and boxes.serves(query, key, values, chunk, scale):
            yield boxes.prepare(query, key, values, chunk, scale, outs, logsumexp, config)
            continue
        if config.gluon:
            config = configs.pointer_config(query, values, chunk, bias is not None, tf32)
        elif config.descriptors or (config.maxnreg and not plain):
            config = config.general()
        if out.dtype != value.dtype:
            config = configs.for_unrounded(config, chunk.branches * values.shape[3])
        whole_maps = all(set(rows[group]) == set(branches) for group, *branches in chunk.table)
        yield pointers.prepare(
            query,
            key,
            values,
            bias,
            chunk,
            scale,
            outs,
            logsumexp,
            known_here,
            row_weight,
            known_here or whole_maps,
            config,
            key_lengths,
        )
