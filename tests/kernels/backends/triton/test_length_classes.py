"""Launch configurations by length: short sequences get enough programs, long ones keep the large tiles."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")

from fpe_kernels.backends.triton import rules, tuned
from fpe_kernels.backends.triton.configs import (
    MULTIPROCESSORS,
    SHARED_MEMORY,
    Config,
    for_length,
    for_streamed,
    forward_config,
    product_config,
    resident_config,
    score_config,
)

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


def test_wide_accumulators_leave_registers_for_addresses(monkeypatch):
    """Half the warps hold twice the addresses each: wide values keep their warps, others load fewer keys at once."""
    monkeypatch.setattr(tuned, "FORWARD", {})  # what the rules say, whatever was measured since
    assert forward_config("sm_90", 160, 320, 2, False, 8, 16384) == Config(128, 32, 8, 3)
    assert forward_config("sm_90", 160, 320, 2, False, 8, 256) == Config(64, 32, 8, 3)
    assert forward_config("sm_90", 160, 160, 2, False, 8, 256) == Config(64, 32, 4, 2)
    assert forward_config("sm_90", 64, 128, 2, False, 8, 256) == Config(64, 64, 4, 3)


def test_warps_on_hopper_have_sixteen_rows_of_their_own():
    for head_dim, branches in ((40, 1), (40, 2), (64, 1), (64, 2), (80, 2), (64, 5), (160, 1), (160, 2)):
        columns = head_dim * branches
        for config in (
            product_config("sm_90", head_dim, columns, 2, False),
            score_config("sm_90", head_dim, min(columns, 160), 2, False),
        ):
            assert config.block_m == 16 * config.warps


@pytest.mark.parametrize(
    ("tokens", "block_n"), [(77, 32), (64, 64), (256, 64), (257, 64), (1, 32), (100, 64), (4096, 64)]
)
def test_a_prompt_is_padded_to_no_more_than_it_must(tokens, block_n):
    assert for_streamed(LARGE, tokens).block_n == block_n
    assert for_streamed(Config(64, 32, 4, 2), tokens).block_n == 32
    assert resident_config("sm_90", 64, 128, 2, False, 16, 4096, tokens, adjoint=False).block_n == block_n
    assert score_config("sm_90", 64, 64, 2, False, tokens).block_n == block_n


def test_single_precision_and_small_tiles_stay():
    assert for_length(LARGE, "sm_90", 4, 1, 64) == LARGE
    small = product_config("sm_80", 160, 320, 2, False)
    assert small.block_m < 128 and for_length(small, "sm_80", 2, 1, 64) == small


def test_every_architecture_has_its_limits():
    assert MULTIPROCESSORS.keys() == SHARED_MEMORY.keys()


@pytest.mark.parametrize("chip", SHARED_MEMORY)
@pytest.mark.parametrize("element", rules.ELEMENTS)
@pytest.mark.parametrize("kernel", rules.KERNELS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_last_row_of_the_rules_holds_every_width(kernel, element, chip, bias):
    if (kernel, element) == ("gradient", "tf32") and chip in rules.EXACT_GRADIENTS:
        assert not rules.rows_of(kernel, element, chip, bias)
        return
    *_, last = rules.rows_of(kernel, element, chip, bias)
    assert (last.head, last.packed, last.both) == (rules.ANY,) * 3
    assert rules.row_for(kernel, element, chip, bias, rules.ANY // 4, rules.ANY // 4) == last


def test_every_row_of_the_rules_serves_some_width_on_each_of_its_chips():
    """What an earlier row has taken already would be dead, and its tiles never compiled."""
    widths = (64, 96, 128, 160, 192, 256, 320)  # between two neighbours, no row begins
    for kernel, element, chip in itertools.product(rules.KERNELS, rules.ELEMENTS, SHARED_MEMORY):
        if (kernel, element) == ("gradient", "tf32") and chip in rules.EXACT_GRADIENTS:
            continue
        listed = {row for bias in (False, True) for row in rules.rows_of(kernel, element, chip, bias)}
        shapes = itertools.product((False, True), widths, widths)
        served = {rules.row_for(kernel, element, chip, *shape) for shape in shapes}
        assert served == listed
