"""`python -m benchmarks.throughput`: what the kernel for Hopper should reach, tile by tile, beside what it reached.

A multiprocessor's cycles for one tile of keys, by what they go into:

    tensor       products at 2048 multiply-adds a cycle; of scores, one too narrow waits for shared memory, 128 bytes a
                 cycle
    exponential  16 a cycle
    issue        instructions of a warp, four warps a cycle, counted in SASS: 12 + 5.6 a score + 1.6 an accumulator
    L2           boxes of keys and values by sectors of 32 bytes, :data:`L2_RATE` bytes a cycle
    copies       rows of boxes, of at most 128 bytes, :data:`COPY` cycles each

A tile takes the longer of `tensor` and `exponential`, :data:`EXPOSED` of the shorter, and `LATENCY`; a program's first
tile and its output take `START` more. Of tiles of 256 rows :data:`EXPOSED_TWICE` is exposed: a warpgroup that has two
instructions for every product has half as many others to hide behind. Warpgroups that issue in turns
(:mod:`.hopper_tiles`) are taken to hide as much as those that run as they like.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, log, sqrt

from fpe_kernels.backends.triton import hopper
from fpe_kernels.backends.triton.chips import MULTIPROCESSORS
from fpe_kernels.backends.triton.configs import Config
from fpe_kernels.backends.triton.packing import split_width

from . import hopper_tiles
from .cases import Case
from .rows import ROOT, Row, read

CLOCK = 1.755e9  # cycles a second: H100 SXM's and H200's boost clock at which the data sheet's tensor rate holds
# Fitted to the committed rows of the tuner:
EXPOSED = 0.17  # of the shorter of two pipes, what the other does not hide
EXPOSED_TWICE = 0.57  # the same, where a warpgroup has 128 rows
LATENCY = 585  # cycles a tile: barriers, the way from one pipe to another
START = 15500  # cycles a tile of queries, and what a launch takes: queries come, first scores, the output is written
COPY = 2.9  # cycles from one row of a box to the next
L2_RATE = 23.4  # bytes a cycle of one multiprocessor: the most that any row shows
SECTOR = 32
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Estimate:
    """Cycles of a multiprocessor for one tile of queries against one of keys."""

    tensor: float
    exponential: float
    issue: float
    l2: float
    copies: float
    exposed: float  # of the shorter of the first two

    @property
    def cycles(self) -> float:
        longer, shorter = max(self.tensor, self.exponential), min(self.tensor, self.exponential)
        return max(longer + self.exposed * shorter + LATENCY, self.issue, self.l2, self.copies)

    @property
    def limit(self) -> str:
        """What the cycles go into most."""
        for name, taken in (("issue", self.issue), ("L2", self.l2), ("copies", self.copies)):
            if self.cycles == taken:
                return name
        return "tensor" if self.tensor >= self.exponential else "exponential"


def estimate(head_dim: int, branches: int, config: Config) -> Estimate:
    """For ``branches`` in one launch, values as wide as keys."""
    pieces = split_width(head_dim)
    width = sum(pieces)
    packed = branches * width
    groups, rows = hopper.warpgroups(config.block_m)
    halves, keys = config.block_m // hopper.ROWS, config.block_n
    # An instruction has 64 rows and 16 of the summed axis; queries and the other operand come from shared memory.
    scores = halves * width / 16 * max(keys / 2, (2048 + 32 * keys) / 128)
    values = halves * keys / 16 * packed / 2
    in_thread = rows / 128
    issue = (12 + 5.6 * in_thread * keys + 1.6 * in_thread * packed) * groups
    row = 2 * head_dim
    # A row that starts in the middle of a sector touches one more; every second head does where rows are no sectors.
    sectors = (-(-row // SECTOR) + (0.5 if row % SECTOR else 0.0)) * SECTOR
    l2 = keys * (1 + branches) * sectors / L2_RATE
    boxes = (1 + branches) * sum(-(-piece // 64) for piece in pieces)
    exposed = EXPOSED if rows == hopper.ROWS else EXPOSED_TWICE
    return Estimate(scores + values, halves * hopper.ROWS * keys / 16, issue, l2, COPY * keys * boxes, exposed)


def tflops(head_dim: int, branches: int, config: Config, maps: int, tokens: int) -> float:
    """For maps times heads of as many queries as keys: waves of one program a multiprocessor, or two of 64 rows."""
    tiles, steps = -(-tokens // config.block_m), -(-tokens // config.block_n)
    resident = MULTIPROCESSORS["sm_90"] * (2 if config.block_m == hopper.ROWS else 1)
    waves = -(-maps * tiles // resident)
    shared = resident // MULTIPROCESSORS["sm_90"]
    seconds = waves * shared * (START + steps * estimate(head_dim, branches, config).cycles) / CLOCK
    return 2.0 * maps * tokens**2 * head_dim * (1 + branches) / seconds / 1e12


@dataclass(frozen=True)
class Compared:
    """A measured row of the tuner beside the model."""

    name: str
    measured: float
    expected: float

    @property
    def error(self) -> float:
        """log(expected / measured)."""
        return log(self.expected / self.measured)


def compare(rows: Iterable[Row]) -> list[Compared]:
    """Rows of the suite `tuning` whose launch the model knows: equal rows a map, several waves, one launch."""
    found = []
    for row in rows:
        tile = re.search(r"@(\d+)x(\d+)w4s(\d+)(s?)go?$", row.provider)
        if tile is None or not row.median_ms or row.suite != "tuning":
            continue
        case = Case.parse(row.case)
        queries, keys, slots = map(int, tile.groups()[:3])
        config = Config(queries, keys, hopper.WARPS, slots, specialised=bool(tile[4]), gluon=True)
        branches = case.batch // case.maps
        held = hopper.most_branches(case.head_dim, case.head_dim, config, hopper.LEAST_HELD)
        if case.layout == "guided" or case.tokens < 4096 or held < branches:
            continue
        maps, flops = case.maps * case.heads, 2.0 * case.tokens**2 * case.head_dim
        measured = flops * maps * (1 + branches) / (1e-3 * row.median_ms) / 1e12
        expected = tflops(case.head_dim, branches, config, maps, case.tokens)
        found.append(
            Compared(f"{case.tokens}x{case.heads}x{case.head_dim} R {branches} {row.provider}", measured, expected)
        )
    return found


def spread(compared: list[Compared]) -> float:
    """The factor by which the model is typically wrong, less one: root mean square of the logarithms."""
    return exp(sqrt(sum(one.error**2 for one in compared) / len(compared))) - 1


def main() -> None:
    compared = compare(read(RESULTS / "cuda-tuning.json"))
    print("Measured, TFLOP/s beside the model's:")
    for one in compared:
        print(f"  {one.name:48} {one.measured:5.0f} {one.expected:5.0f}  {100 * (exp(one.error) - 1):+4.0f} %")
    print(f"typically wrong by {100 * spread(compared):.0f} % ({len(compared)} rows)\n")
    print("Expected, N = 4096, 8 heads, 2 maps:")
    for head_dim, branches in hopper_tiles.TILES:
        for name in hopper_tiles.in_one_launch(head_dim, branches):
            config = hopper_tiles.config_of(name)
            cost = estimate(head_dim, branches, config)
            expected = tflops(head_dim, branches, config, 16, 4096)
            print(f"  {head_dim:3} R {branches} {name:11} {expected:5.0f} TFLOP/s  {cost.limit}")


if __name__ == "__main__":
    main()
