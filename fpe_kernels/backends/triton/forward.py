"""The forward product, launch by launch: which maps share one, which columns, which kernel, which configuration.

Maps with unequal numbers of batch rows (a guided batch, whose unconditional rows have maps of their own) take a launch
for each number, or one together, as wide as the widest: :func:`.configs.one_launch` decides.

The last part of a joined map takes up the product over the other parts, before it is rounded. The part that most rows
share goes first, into float32, for all of them at once; the small private part follows, and takes the other's product
up where its own accumulators lie. So the private product is never written in float32, and what merging reads and writes
is one float32 product and the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from ..grouping import rows_by_map
from ..protocol import Maps
from . import configs, hopper
from .apply_launch import ApplyTensors, prepare
from .configs import MAX_COLUMNS, Config
from .experimental import boxes
from .launch import Launch, product_precision
from .packing import Chunk, chunks
from .plans import launch_all

MAX_MERGED_COLUMNS = 160
"""Packed columns of one launch that merges: a tile of the other product wants registers beside the accumulators."""


class ApplySettings(NamedTuple):
    """What the launches follow from besides the tensors: two of the rules, which can be replaced, among it."""

    map_index: tuple[int, ...]
    scale: float
    key_lengths: tuple[int, ...] | None
    known: bool
    one_launch: Callable[..., bool]
    apply_config: Callable[..., Config]


def apply(
    maps: Maps, value: Tensor, out: Tensor, logsumexp: Tensor, known: bool, row_weight: Tensor | None = None
) -> None:
    """Write ``row_weight ⊙ (A[map_index] @ value)`` to ``out`` and, unless it is known, the log-sum-exp."""
    logsumexp = logsumexp.contiguous() if known else logsumexp
    tensors = ApplyTensors(maps.query, maps.key, value, maps.bias, out, logsumexp, row_weight)
    settings = maps.map_index, maps.scale, maps.key_lengths, known, configs.one_launch, configs.apply_config
    launch_all(plan, tensors, ApplySettings(*settings))


def apply_merged(
    maps: Maps,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    known: bool,
    row_weight: Tensor | None,
    prior: Tensor,
    prior_logsumexp: Tensor,
) -> None:
    """As :func:`apply`, merged with ``prior`` [B, H, N, E] over other keys; ``logsumexp`` is that of these keys."""
    logsumexp = logsumexp.contiguous() if known else logsumexp
    if prior.stride() != out.stride():
        prior = out.new_empty(out.shape, dtype=prior.dtype).as_strided(out.shape, out.stride()).copy_(prior)
    priors = prior, prior_logsumexp.contiguous()
    tensors = ApplyTensors(maps.query, maps.key, value, maps.bias, out, logsumexp, row_weight, *priors)
    settings = maps.map_index, maps.scale, maps.key_lengths, known, never_one_launch, configs.pointer_config
    launch_all(plan, tensors, ApplySettings(*settings))


def never_one_launch(*tensors: object) -> bool:
    """Of launches that merge, wider ones have not been measured."""
    return False


def plan(tensors: ApplyTensors, settings: ApplySettings) -> Iterator[Launch]:
    """The launches of :func:`apply` and of :func:`apply_merged`."""
    query, value, bias = tensors.query, tensors.value, tensors.bias is not None
    tensors = tensors.expanded()
    together = settings.one_launch(query, value, settings.map_index, bias)
    most = MAX_COLUMNS[query.element_size()] if tensors.prior is None else MAX_MERGED_COLUMNS
    tf32 = product_precision(query.dtype) == "tf32"
    for chunk in chunks(settings.map_index, query.shape[0], value.shape[3], most, together):
        part = tensors.of(chunk)
        config = settings.apply_config(query, part.value, chunk, bias, tf32)
        yield from _launches(part, chunk, config, settings)


def _launches(part: ApplyTensors, chunk: Chunk, config: Config, settings: ApplySettings) -> Iterator[Launch]:
    """Those of a chunk, by the kernel that ``config`` asks for where it serves, else by the general one."""
    query, key, value, bias, out, logsumexp, row_weight, prior, _ = part
    scale, lengths, known = settings.scale, settings.key_lengths, settings.known or not chunk.first
    # What has fewer keys for some maps, or fewer heads of keys or values, is of the general kernel.
    whole = lengths is None and query.shape[1] == key.shape[1] == value.shape[1]
    plain = whole and bias is None and row_weight is None and prior is None
    # The kernel for Hopper writes float32 too, but no measured row shows that on a device yet.
    proven = out.dtype == value.dtype
    if config.gluon and plain and proven and not hopper.refusal(query, key, value, chunk, scale, config):
        yield from hopper.launches(query, key, value, chunk, scale, out, logsumexp, known, config)
        return
    plain = plain and not known
    if config.descriptors and plain and boxes.serves(query, key, value, chunk, scale):
        yield boxes.prepare(query, key, value, chunk, scale, out, logsumexp, config)
        return
    if config.gluon:
        tf32 = product_precision(query.dtype) == "tf32"
        config = configs.pointer_config(query, value, chunk, bias is not None, tf32)
    elif config.descriptors or (config.maxnreg and not plain):
        config = config.general()
    if out.dtype != value.dtype and prior is None:
        config = configs.for_unrounded(config, chunk.branches * value.shape[3])
    yield prepare(part, chunk, scale, known, _skips(part, chunk, known, settings.map_index), config, lengths)


def _skips(part: ApplyTensors, chunk: Chunk, known: bool, map_index: tuple[int, ...]) -> bool:
    """Whether nothing else needs the statistics of rows that have no weight here."""
    if part.prior is not None:
        return False  # they have one in the other product's statistics
    rows = rows_by_map(map_index, part.query.shape[0])
    return known or all(set(rows[group]) == set(branches) for group, *branches in chunk.table)
