"""Fixed launch configurations: tile sizes, warps and pipeline stages, by kernel, width, architecture and length class.

Runs are reproducible because nothing is tuned at run time. :mod:`.rules` is a table of tiles by the widths that they
hold (``sum(split_width(...))``), so one row serves every head dim between two entries; here they are fitted to shared
memory and to the length of a call, and the table of what was measured (:mod:`.tuned`) goes before them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from . import rules, tuned
from .chips import MULTIPROCESSORS, SHARED_MEMORY, architecture
from .packing import Chunk, chunks, split_width

MAX_COLUMNS = {2: 320, 4: 160}
"""Packed columns of one forward or adjoint launch by bytes of an element; 320 is SD 1.5's widest pair, 2 × 160."""

MAX_GRADIENT_COLUMNS = 160
"""Packed columns of one gradient launch, which holds a resident and a streamed tile of them."""

LENGTHS = (256, 1024, 4096, 16384)
"""Length classes of the tuner's table, in tokens: from the inner levels of a UNet at 512 px to SDXL's outer at 2048."""


@dataclass(frozen=True)
class Config:
    """Rows of the resident tile, rows of a streamed tile, warps of a program, stages of the load pipeline.

    The rules leave the rest as it is; the tuner measures them.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool = False  # keys and values through the bulk copy engine, where the layout allows it
    specialised: bool = False  # with descriptors: further warps that only fetch; with gluon: warpgroups take turns
    maxnreg: int = 0  # registers of a thread at most, so that more programs share a multiprocessor; 0: no bound
    gluon: bool = False  # the kernel for Hopper, where it serves: warpgroups of `warps`, and a warp that fetches
    single: bool = False  # with gluon: a program for each tile, not as many as run at once that take one after another
    exact: bool = False  # products of float32 are not rounded where they may be

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the constants of the kernel."""
        # Of a version's default nobody hears: without multiply-adds every score takes an instruction more.
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return {**options, "maxnreg": self.maxnreg} if self.maxnreg else options

    def general(self) -> Config:
        """The same tiles for what the tuner does not measure: fetched by addresses, by warps that compute as well.

        Not for the kernel for Hopper, whose tiles are no other's: :func:`pointer_config`.
        """
        warps = max(self.warps, self.block_m // 16) if self.specialised else self.warps
        return Config(self.block_m, self.block_n, warps, self.stages, exact=self.exact)


def _staged(tiles: rules.Tiles, arch: str, resident: int, streamed: int, itemsize: int, bias: bool) -> Config:
    """``tiles`` with as many of their stages as fit into the shared memory of ``arch`` beside the resident tile.

    ``resident`` and ``streamed`` are the columns that a row of each holds.
    """
    block_m, block_n, warps, most = tiles
    fixed = block_m * resident * itemsize + (2 * block_m * block_n * itemsize if bias else 0)
    stage = block_n * streamed * itemsize
    # The loads of one stage wait in registers there.
    limit = SHARED_MEMORY[arch] + (stage if arch == "gfx942" else 0)
    stages = max((count for count in range(1, most + 1) if fixed + count * stage <= limit), default=1)
    return Config(block_m, block_n, warps, stages)


def _relieved(config: Config, arch: str, head: int, packed: int, bias: bool) -> Config:
    """Half of a tile since Hopper, with registers for the addresses, of which a thread has twice as many."""
    if arch == "sm_100":
        return replace(config, block_n=32, warps=2 * config.warps) if bias else config
    if arch == "sm_120":
        return replace(config, warps=2 * config.warps) if packed > 64 else config
    if packed > 160 or (bias and head > 96):
        return replace(config, warps=2 * config.warps)
    return replace(config, block_n=32) if head > 128 else config


@lru_cache(maxsize=1024)
def product_config(
    arch: str,
    head_dim: int,
    columns: int,
    itemsize: int,
    bias: bool,
    tf32: bool = False,
    adjoint: bool = False,
) -> Config:
    """The configuration of ``apply`` and ``adjoint``: a resident tile of one axis, scores, packed accumulators."""
    head, packed = sum(split_width(head_dim)), sum(split_width(columns))
    found = rules.row_for("adjoint" if adjoint else "apply", _element(itemsize, tf32), arch, bias, head, packed)
    return _staged(found.tiles, arch, head, head + packed, itemsize, bias)


@lru_cache(maxsize=1024)
def score_config(
    arch: str,
    head_dim: int,
    columns: int,
    itemsize: int,
    bias: bool,
    streamed: int = LENGTHS[-1],
    tf32: bool = False,
) -> Config:
    """The configuration of the gradient kernel: two resident tiles, scores and their gradient, one accumulator."""
    head, packed = sum(split_width(head_dim)), sum(split_width(columns))
    exact = arch in rules.EXACT_GRADIENTS and itemsize == 4
    found = rules.row_for("gradient", _element(itemsize, tf32 and not exact), arch, bias, head, packed)
    config = _staged(found.tiles, arch, head + packed, head + packed, itemsize, bias)
    return for_streamed(replace(config, exact=exact), streamed)


def _element(itemsize: int, tf32: bool) -> str:
    """As the rules name it."""
    if itemsize == 2:
        return "half"
    return "tf32" if tf32 else "float32"


def for_streamed(config: Config, tokens: int) -> Config:
    """``config``, or for a streamed axis of few ``tokens`` the same with half the streamed rows.

    The 77 tokens of a prompt take two tiles of 64, but three of 32: a quarter less of all that is computed. Where half
    tiles leave less than an eighth out, whole ones have fewer steps.
    """
    whole, half = (-(-tokens // block) * block for block in (config.block_n, config.block_n // 2))
    if config.block_n < 64 or 8 * half > 7 * whole:
        return config
    return replace(config, block_n=config.block_n // 2)


def for_length(config: Config, arch: str, itemsize: int, maps: int, rows: int) -> Config:
    """``config``, or for short sequences the same with half the resident rows and half the warps.

    A wave of programs is one for each multiprocessor. Where tiles of 128 rows make less than two waves and leave more
    than a fifth of the last idle, half tiles fill it; on longer sequences they would only read the keys twice as often.
    The accumulators of a thread stay the same.

    Args:
        config: that of the width.
        arch: key of :data:`MULTIPROCESSORS`.
        itemsize: bytes of an element; float32 tiles are small already.
        maps: maps of the launch times heads.
        rows: of the resident axis.
    """
    if itemsize == 4 or config.block_m < 128:
        return config
    programs, wave = maps * -(-rows // config.block_m), MULTIPROCESSORS[arch]
    waves = -(-programs // wave)
    if waves > 2 or programs > 0.8 * waves * wave:
        return config
    return replace(config, block_m=config.block_m // 2, warps=config.warps // 2)


def for_unrounded(config: Config, columns: int) -> Config:
    """``config`` for an output in float32: its addresses take registers that wide accumulators leave to the scores."""
    if sum(split_width(columns)) <= 160:
        return config
    return replace(config, block_n=min(config.block_n, 32 if config.block_m > 32 else 16))


def length_class(tokens: int) -> int:
    """The entry of :data:`LENGTHS`, each four times the one before, that is nearest to ``tokens`` by ratio."""
    return next((length for length in LENGTHS if tokens <= 2 * length), LENGTHS[-1])


@lru_cache(maxsize=1024)
def resident_config(
    arch: str,
    head_dim: int,
    columns: int,
    itemsize: int,
    bias: bool,
    maps: int,
    rows: int,
    streamed: int = LENGTHS[-1],
    tf32: bool = False,
    adjoint: bool = True,
) -> Config:
    """What the rules say for ``adjoint``, or for ``apply``.

    Args:
        arch: key of :data:`SHARED_MEMORY`.
        head_dim: of the queries.
        columns: packed columns of the launch.
        itemsize: bytes of an element.
        bias: whether the scores have one.
        maps: maps of the launch times heads.
        rows: tokens of the resident axis.
        streamed: tokens of the other axis; by default many.
        tf32: whether products of float32 may be rounded, which the matrix units do.
        adjoint: whether the kernel is that of ``adjoint``, which loads more in a step.
    """
    config = product_config(arch, head_dim, columns, itemsize, bias, tf32, adjoint)
    chosen = for_length(config, arch, itemsize, maps, rows)
    if chosen != config and arch in ("sm_90", "sm_100", "sm_120"):
        chosen = _relieved(chosen, arch, sum(split_width(head_dim)), sum(split_width(columns)), bias)
    return for_streamed(chosen, streamed)


@lru_cache(maxsize=1024)
def forward_config(
    arch: str,
    head_dim: int,
    columns: int,
    itemsize: int,
    bias: bool,
    maps: int,
    rows: int,
    keys: int = LENGTHS[-1],
    tf32: bool = False,
) -> Config:
    """The configuration of ``apply``: the tuner's where it has measured a faster one than the rules', else the rules'.

    The tuner measures as many keys as queries, without a bias; the arguments are those of :func:`resident_config`.
    """
    key = (arch, sum(split_width(head_dim)), sum(split_width(columns)), length_class(rows))
    if itemsize == 2 and not bias and keys > LENGTHS[0] // 2 and key in tuned.FORWARD:
        return Config(*tuned.FORWARD[key])
    return resident_config(arch, head_dim, columns, itemsize, bias, maps, rows, keys, tf32, adjoint=False)


def apply_config(query: Tensor, value: Tensor, chunk: Chunk, bias: bool, tf32: bool = False) -> Config:
    """For a forward launch of ``chunk``; ``value`` is narrowed to its columns."""
    columns, maps = chunk.branches * value.shape[3], len(chunk.table) * query.shape[1]
    arch, (queries, head_dim), keys = architecture(query.device), query.shape[2:], value.shape[2]
    return forward_config(arch, head_dim, columns, query.element_size(), bias, maps, queries, keys, tf32)


def pointer_config(query: Tensor, value: Tensor, chunk: Chunk, bias: bool, tf32: bool = False) -> Config:
    """What the rules say where :func:`apply_config` names a kernel that does not serve the launch."""
    columns, maps = chunk.branches * value.shape[3], len(chunk.table) * query.shape[1]
    arch, (queries, head_dim), keys = architecture(query.device), query.shape[2:], value.shape[2]
    shape = arch, head_dim, columns, query.element_size(), bias, maps, queries, keys
    return resident_config(*shape, tf32, adjoint=False)


def adjoint_config(query: Tensor, weight: Tensor, chunk: Chunk, bias: bool, keys: int, tf32: bool = False) -> Config:
    """For an adjoint launch of ``chunk`` over ``keys`` key tokens; ``weight`` is narrowed to its columns."""
    columns, maps = chunk.branches * weight.shape[3], len(chunk.table) * query.shape[1]
    arch, (queries, head_dim) = architecture(query.device), query.shape[2:]
    return resident_config(arch, head_dim, columns, query.element_size(), bias, maps, keys, queries, tf32)


def gradient_config(own: Tensor, other: Tensor, factor: Tensor, chunk: Chunk, bias: bool, tf32: bool = False) -> Config:
    """For a gradient launch of ``chunk``; ``factor`` is narrowed to its columns."""
    columns, arch = chunk.branches * factor.shape[3], architecture(own.device)
    return score_config(arch, own.shape[3], columns, own.element_size(), bias, other.shape[2], tf32)


def one_launch(query: Tensor, value: Tensor, map_index: tuple[int, ...], bias: bool) -> bool:
    """Whether maps with unequal numbers of batch rows share forward launches, each as wide as the widest map."""
    _, heads, tokens, head_dim = query.shape
    arch = architecture(query.device)
    return joins(arch, map_index, heads, tokens, head_dim, value.shape[3], query.element_size(), bias)


@lru_cache(maxsize=1024)
def joins(
    arch: str,
    map_index: tuple[int, ...],
    heads: int,
    tokens: int,
    head_dim: int,
    value_dim: int,
    itemsize: int,
    bias: bool,
) -> bool:
    """:func:`one_launch` by numbers: as the tuner measured it, else what takes fewer waves of programs.

    Launches follow one another, each with a last wave that leaves multiprocessors idle; one launch fills them, and
    computes columns that nobody asked for. A wave takes the time of the rows that a multiprocessor holds times the
    width of their products; two launches stay where that makes no difference.
    """
    maps = max(map_index, default=-1) + 1
    plans = [chunks(map_index, maps, value_dim, MAX_COLUMNS[itemsize], together) for together in (False, True)]
    if len(plans[0]) == len(plans[1]):
        return False
    widest = max(chunk.branches * (chunk.stop - chunk.start) for chunk in plans[1])
    key = (arch, sum(split_width(head_dim)), sum(split_width(widest)), length_class(tokens))
    if itemsize == 2 and not bias and key in tuned.TOGETHER:
        return tuned.TOGETHER[key]

    def waves(chunk: Chunk) -> int:
        columns, entries = chunk.branches * (chunk.stop - chunk.start), len(chunk.table) * heads
        config = forward_config(arch, head_dim, columns, itemsize, bias, entries, tokens)
        # Programs of a multiprocessor, as `for_length` counts them.
        resident = 1 if config.gluon and config.block_m > 64 else max(1, 8 // config.warps)
        count = -(-entries * -(-tokens // config.block_m) // (resident * MULTIPROCESSORS[arch]))
        return count * resident * config.block_m * (sum(split_width(head_dim)) + sum(split_width(columns)))

    separate, together = (sum(map(waves, plan)) for plan in plans)
    return together < separate
