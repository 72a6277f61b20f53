"""Which tiles of the kernel for Hopper are measured and compiled ahead, by head dim and branches.

``128x64s3`` are 128 rows of queries, 64 of keys, three slots of a ring; a ``t`` behind it: warpgroups issue in turns;
an ``o``: each program takes one tile of queries; a ``v``: values lie in one piece, as wide as the next power of two.
"""

from __future__ import annotations

import re

from fpe_kernels.backends.triton import hopper
from fpe_kernels.backends.triton.configs import Config

TILES: dict[tuple[int, int], tuple[str, ...]] = {
    (40, 1): ("128x128s2v", "128x128s2tv", "192x128s2v", "192x128s2", "256x64s3"),
    (40, 2): ("128x128s2v", "128x128s2tv", "192x64s3v", "256x64s3", "256x64s3o"),
    (40, 4): ("128x64s3v", "128x64s3tv", "128x64s3", "128x64s3t"),
    (64, 1): ("128x128s2", "128x128s2t", "192x128s2", "192x64s3", "256x64s3"),
    (64, 2): ("128x128s2", "128x128s2t", "192x64s3", "256x32s4"),
    (64, 4): ("128x64s3", "128x64s3t"),
    (80, 1): ("128x128s2", "128x128s2t", "192x64s3"),
    (80, 2): ("128x128s2", "128x128s2t", "128x64s3"),
    (80, 4): ("128x64s2", "128x64s2t", "128x32s3"),
    (128, 1): ("128x128s2", "128x128s2t"),
    (128, 2): ("128x64s2", "128x64s2t", "128x64s3"),
    (160, 1): ("128x128s2", "128x64s3"),
    (160, 2): ("128x64s2", "128x32s3", "128x128s2"),
    (160, 4): ("128x64s2", "128x64s2t"),
}
"""The likeliest first. All of them compile without spills and without a wait for every product: :mod:`.sass` is the
judge. Tiles of 256 rows read the keys half as often, and those of 192 have a third warpgroup to hide behind.
Where fewer branches fit than there are, there are several launches.
"""

SHORT = ("64x64s3", "64x128s2")
"""For short sequences: tiles of 64 rows occupy more multiprocessors."""


def config_of(name: str) -> Config:
    """The configuration of a name."""
    found = re.fullmatch(r"(\d+)x(\d+)s(\d+)(t?)(o?)(v?)", name)
    if found is None:
        raise ValueError(f"expected tiles such as 128x64s3, 256x32s4t, 256x64s3o or 128x128s2v, got {name!r}")
    rows, keys, slots = map(int, found.groups()[:3])
    turns, single, whole = (bool(mark) for mark in found.groups()[3:])
    return Config(rows, keys, hopper.WARPS, slots, specialised=turns, gluon=True, single=single, whole=whole)


def offered(head_dim: int, branches: int, tokens: int) -> list[Config]:
    """At most five, that hold one branch at least."""
    near = min(TILES, key=lambda entry: (abs(entry[0] - head_dim), abs(entry[1] - branches)))
    names = TILES[near]
    if tokens <= 1024:
        names = tuple(name for name in names if not name.startswith(("192", "256")))[:2] + SHORT
    return [config for config in map(config_of, names) if hopper.most_branches(head_dim, head_dim, config) > 0]


def in_one_launch(head_dim: int, branches: int) -> list[str]:
    """The names of those that hold all branches, with the assembler that holds most."""
    most = {
        name: hopper.most_branches(head_dim, head_dim, config_of(name), hopper.LEAST_HELD)
        for name in TILES[head_dim, branches]
    }
    return [name for name, held in most.items() if held >= branches]
