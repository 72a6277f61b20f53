"""Which tiles of the kernel for Hopper are measured and compiled ahead, by head dim and branches.

``128x64s3`` are 128 rows of queries, 64 of keys, three slots of a ring; a ``t`` behind it: warpgroups issue in turns;
an ``o``: each program takes one tile of queries. The tuner measures every tile that holds; :data:`TILES` are those
whose programs are read where there is no chip.
"""

from __future__ import annotations

import re

from fpe_kernels.backends.triton import hopper
from fpe_kernels.backends.triton.configs import Config

TILES: dict[tuple[int, int], tuple[str, ...]] = {
    (40, 1): ("192x128s3t", "192x128s3", "128x128s3", "256x64s3"),
    (40, 2): ("256x64s4o", "192x64s4t", "192x64s4", "128x128s3t", "128x128s3o"),
    (40, 4): ("128x64s3", "128x64s3t"),
    (64, 1): ("128x128s2", "128x128s2t", "192x128s2", "192x128s3t", "256x64s3"),
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
    found = re.fullmatch(r"(\d+)x(\d+)s(\d+)(t?)(o?)", name)
    if found is None:
        raise ValueError(f"expected tiles such as 128x64s3, 256x32s4t or 256x64s3o, got {name!r}")
    rows, keys, slots = map(int, found.groups()[:3])
    return Config(rows, keys, hopper.WARPS, slots, specialised=bool(found[4]), gluon=True, single=bool(found[5]))


def offered(head_dim: int, branches: int) -> list[Config]:
    """Every tile that holds the branches: of two to four slots, in turns or not, one a program or one after another.

    Where none holds them all, those that hold most.
    """
    every = [
        Config(rows, keys, hopper.WARPS, slots, specialised=turns, gluon=True, single=single)
        for rows in hopper.TILE_ROWS
        for keys in (32, 64, 128)
        for slots in (2, 3, 4)
        for turns in (False, True)
        for single in (False, True)
        if rows > hopper.ROWS or not turns  # a warpgroup alone takes no turns
    ]
    held = {config: min(branches, hopper.most_branches(head_dim, head_dim, config)) for config in every}
    most = max(held.values())
    return [config for config in every if held[config] == most > 0]


def in_one_launch(head_dim: int, branches: int) -> list[str]:
    """The names of those that hold all branches, with the assembler that holds most."""
    most = {
        name: hopper.most_branches(head_dim, head_dim, config_of(name), hopper.LEAST_HELD)
        for name in TILES[head_dim, branches]
    }
    return [name for name, held in most.items() if held >= branches]
