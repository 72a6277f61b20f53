"""The static cost model against numbers worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.cases import Case, grid_cases
from benchmarks.cost import (
    CHIPS,
    Ceilings,
    Work,
    chip_of,
    flash_attention_2,
    launches,
    main,
    needed,
    packed,
    percent_of_chip,
)
from benchmarks.rows import Row


def pair(head_dim: int, op: str = "apply", tokens: int = 4096) -> Case:
    return Case("hand", 512, tokens, 8, head_dim, 1, "pair", op)


@pytest.mark.parametrize(
    ("head_dim", "unedited", "shared"), [(40, 512, 256), (64, 512, 384), (80, 768, 480), (160, 1536, 960)]
)
def test_flops_a_score_of_a_pair(head_dim: int, unedited: int, shared: int) -> None:
    case = pair(head_dim)
    scores = 8 * 4096**2
    assert flash_attention_2(case, 2).flops == unedited * scores
    assert flash_attention_2(case, 2).exponentials == 2 * scores
    for arch in CHIPS:
        assert packed(case, 2, arch).flops == shared * scores
    # 64 and 80 are sums of tiles: nothing is padded but 40, whose 48 and 80 columns stand for 40 and 80.
    assert needed(case, 2).flops == 2 * 3 * head_dim * scores


def test_exponentials_are_one_a_score_and_one_a_row_of_each_tile() -> None:
    scores = 8 * 4096**2
    assert packed(pair(64), 2, "sm_80").exponentials == scores + scores // 64  # tiles of 128 × 64
    assert packed(pair(64, "replay"), 2, "sm_80").exponentials == scores
    assert packed(pair(64, "adjoint"), 2, "sm_80").exponentials == scores


def test_bytes_are_every_operand_once() -> None:
    # One map's query and key, two values, two outputs in half precision; one float32 a row.
    assert packed(pair(64), 2, "sm_90").bytes == 8 * 4096 * (6 * 64 * 2 + 4)


def test_ragged_lengths_take_whole_tiles() -> None:
    assert packed(pair(64, tokens=4000), 2, "sm_80").flops == 384 * 8 * 4096 * 4032  # 32 × 128 by 63 × 64


def test_more_columns_than_a_launch_are_several() -> None:
    case = Case("hand", 512, 1024, 8, 160, 3, "pair")  # four branches of 160: two launches of two
    first, second = launches(case, 2, "sm_80")
    assert first.flops == second.flops == 960 * 8 * 1024**2
    assert (first.exponentials, second.exponentials) == (8 * 1024**2 * 33 // 32, 8 * 1024**2)


def test_rows_with_maps_of_their_own_are_another_launch() -> None:
    case = Case("hand", 512, 4096, 8, 64, 1, "guided")  # two rows alone, two on one map
    scores = 8 * 4096**2
    assert sorted(work.flops for work in launches(case, 2, "sm_90")) == [384 * scores, 2 * 256 * scores]


def test_a_short_mixed_batch_is_one_launch_as_wide_as_its_widest_map() -> None:
    case = Case("hand", 128, 256, 8, 64, 1, "guided")
    (work,) = launches(case, 2, "sm_90")
    assert work.flops == 3 * 384 * 8 * 256**2
    assert work.bytes == 8 * 256 * ((2 * 3 + 2 * 4) * 64 * 2 + 3 * 4)  # each of three maps and four rows once


def test_backward_is_four_passes_over_the_scores() -> None:
    case = pair(64, "backward", tokens=1024)
    scores = 8 * 1024**2
    assert [work.flops for work in launches(case, 2, "sm_90")] == [384 * scores] * 2 + [512 * scores] * 2


def test_a_capture_is_more_columns_of_the_same_pass() -> None:
    assert packed(pair(40, "capture"), 2, "sm_90").flops == 2 * (48 + 96) * 8 * 4096**2  # 40 + 40 + 16 = 64 + 32


def test_the_longest_resource_is_the_limit() -> None:
    ceilings = Ceilings(flops=100.0, bytes=10.0, exponentials=1.0)
    assert ceilings.limit(Work(200, 10, 1)) == (2000.0, "matmul")
    assert ceilings.limit(Work(200, 30, 1)) == (3000.0, "copy")
    assert ceilings.limit(Work(200, 30, 4)) == (4000.0, "exp")


def test_what_bounds_a_hopper_is_the_exponential_at_small_head_dims() -> None:
    # 989.4 Tflop/s : 3.87 T exp/s is 256 flops an exponential: D = 40 is bound by exp, D = 80 by the matrix units.
    ceilings = CHIPS["sm_90"].ceilings
    assert ceilings.flops / ceilings.exponentials == pytest.approx(256)
    assert ceilings.limit(packed(pair(40), 2, "sm_90"))[1] == "exp"
    assert ceilings.limit(packed(pair(80), 2, "sm_90"))[1] == "matmul"


@pytest.mark.parametrize("arch", CHIPS)
def test_no_case_does_less_than_it_needs(arch: str) -> None:
    for case in grid_cases():
        work, least = packed(case, 2, arch), needed(case, 2)
        assert work.flops >= least.flops and work.bytes >= least.bytes and work.exponentials >= least.exponentials
        assert CHIPS[arch].ceilings.limit(work)[0] >= CHIPS[arch].ceilings.limit_ms(case, 2)


def measured(device: str, dtype: str = "float16", suite: str = "kernels") -> Row:
    return Row(suite, pair(80).name, "fpe-triton", dtype, device, "ok", samples_ms=(1.0,))


def test_a_measurement_beside_its_data_sheet() -> None:
    row = measured("cuda: NVIDIA H100 80GB HBM3")
    assert percent_of_chip(row) == pytest.approx(100 * 480 * 8 * 4096**2 / 989.4e12 / 1e-3)
    assert percent_of_chip(measured("cuda: NVIDIA H100 80GB HBM3", dtype="float32")) is None
    assert percent_of_chip(measured("cuda: NVIDIA H100 80GB HBM3", suite="edits")) is None
    assert percent_of_chip(measured("cpu: H100 (2 cores)")) is None
    assert chip_of(measured("cuda: NVIDIA A100-SXM4-80GB")) is CHIPS["sm_80"]
    assert chip_of(measured("cuda: NVIDIA A10")) is CHIPS["sm_86"]
    assert chip_of(measured("cuda: NVIDIA T4")) is None


def test_chips_of_one_architecture_have_sheets_of_their_own() -> None:
    h200 = chip_of(measured("cuda: NVIDIA H200"))
    assert h200 is not None and (h200.arch, h200.memory_bytes) == ("sm_90", 4800e9)
    assert CHIPS["sm_90"].name == "H100 SXM" and list(CHIPS) == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100"]
    assert percent_of_chip(measured("cuda: NVIDIA H200")) == percent_of_chip(measured("cuda: NVIDIA H100 80GB HBM3"))


def test_an_unknown_chip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"arch must be one of sm_80, .*got 'sm_70'"):
        packed(pair(64), 2, "sm_70")


def test_the_command_prints_a_line_a_case_and_chip(capsys) -> None:
    assert main([pair(64).name, "--arch", "sm_90"]) == 0
    printed = capsys.readouterr().out
    assert "hand-512/4096x8x64/pair-1/apply" in printed and "exp" in printed and "data sheet, 2023" in printed
