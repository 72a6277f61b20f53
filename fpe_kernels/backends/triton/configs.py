"""Fixed launch configurations: tile sizes, warps and pipeline stages for each kernel, width and architecture.

Runs are reproducible because nothing is tuned at run time. Widths are what the tiles hold (``sum(split_width(...))``),
so one rule serves every head dim between two entries.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Rows of the resident tile, rows of a streamed tile, warps of a program, stages of the load pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


MAX_COLUMNS = 320
"""Packed columns of one launch: SD 1.5's widest pair, two branches of 160."""


def apply_config(query, value, chunk) -> Config:
    return Config(64, 64, 4, 2)


MAX_GRADIENT_COLUMNS = 160


def adjoint_config(query, value, chunk) -> Config:
    return Config(64, 64, 4, 2)


def gradient_config(query, value, chunk) -> Config:
    return Config(64, 64, 4, 2)
