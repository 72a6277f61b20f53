"""Launch configurations by length: short sequences get enough programs, long ones keep the large tiles."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from fpe_kernels.backends.triton.configs import MULTIPROCESSORS, SHARED_MEMORY, Config, for_length, product_config

LARGE = Config(128, 64, 8, 3)


def programs(config: Config, maps: int, rows: int) -> int:
    return maps * -(-rows // config.block_m)


@pytest.mark.parametrize("rows", [64, 256, 1024])
def test_short_sequences_get_half_tiles_with_the_same_accumulators(rows):
    config = for_length(LARGE, "sm_90", 2, maps=8, rows=rows)
    assert config == Config(64, 64, 4, 3)
    assert config.block_m / config.warps == LARGE.block_m / LARGE.warps


@pytest.mark.parametrize(("maps", "rows"), [(8, 16384), (20, 4096), (8, 4096), (32, 1024)])
def test_full_waves_keep_the_large_tiles(maps, rows):
    assert for_length(LARGE, "sm_90", 2, maps, rows) == LARGE


def test_the_choice_never_idles_more_than_the_large_tile():
    """Idle multiprocessor time, in large tiles: what is left of the last wave, two half tiles sharing one."""
    wave = MULTIPROCESSORS["sm_90"]
    for maps in range(1, 40):
        for rows in (64, 100, 256, 576, 1024, 2304, 4096):
            chosen = for_length(LARGE, "sm_90", 2, maps, rows)
            slots = wave * (LARGE.block_m // chosen.block_m)
            used, before = programs(chosen, maps, rows), programs(LARGE, maps, rows)
            assert -(-used // slots) <= -(-before // wave)


def test_single_precision_and_small_tiles_stay():
    assert for_length(LARGE, "sm_90", 4, 1, 64) == LARGE
    small = product_config("sm_80", 160, 320, 2, False)
    assert small.block_m < 128 and for_length(small, "sm_80", 2, 1, 64) == small


def test_every_architecture_has_its_limits():
    assert MULTIPROCESSORS.keys() == SHARED_MEMORY.keys()
