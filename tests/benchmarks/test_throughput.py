"""The model of the kernel for Hopper fits what was measured, and follows from counts that can be made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from benchmarks import hopper_tiles, throughput
from benchmarks.rows import read
from benchmarks.throughput import CLOCK, EXPOSED, LATENCY, START, estimate, tflops


def test_the_committed_rows_are_met() -> None:
    compared = throughput.compare(read(throughput.RESULTS / "cuda-tuning.json"))
    assert len(compared) >= 20
    assert throughput.spread(compared) < 0.05
    assert all(abs(one.error) < 0.16 for one in compared)


@pytest.mark.parametrize("term", ["LATENCY", "COPY", "EXPOSED", "EXPOSED_TWICE", "START"])
def test_a_model_without_one_of_its_terms_is_worse(term, monkeypatch) -> None:
    monkeypatch.setattr(throughput, term, 0)
    assert throughput.spread(throughput.compare(read(throughput.RESULTS / "cuda-tuning.json"))) > 0.06


def test_cycles_of_a_tile_are_those_of_its_pipes() -> None:
    found = estimate(64, 2, hopper_tiles.config_of("128x128s2"))
    assert found.tensor == 128 * 128 * (64 + 2 * 64) / 2048
    assert found.exponential == 128 * 128 / 16
    assert found.cycles == found.tensor + EXPOSED * found.exponential + LATENCY
    assert found.l2 == 128 * 2 * 64 * 3 / throughput.L2_RATE
    assert found.limit == "tensor"
    far = replace(found, l2=10 * found.cycles)
    assert (far.cycles, far.limit) == (far.l2, "L2")
    assert replace(found, tensor=found.exponential - 1, l2=0.0).limit == "exponential"


def test_narrow_scores_wait_for_shared_memory_and_many_rows_halve_what_is_read() -> None:
    narrow, wide = (estimate(64, 2, hopper_tiles.config_of(name)) for name in ("128x32s3", "128x64s3"))
    assert narrow.tensor / 32 > wide.tensor / 64
    few, many = (estimate(40, 2, hopper_tiles.config_of(name)) for name in ("128x64s3", "256x64s3"))
    assert many.tensor == 2 * few.tensor and many.l2 == few.l2


def test_rows_of_boxes_are_copied_one_by_one() -> None:
    found = estimate(40, 1, hopper_tiles.config_of("128x128s2"))
    assert found.copies == throughput.COPY * 128 * 4  # two pieces of keys and of values
    most = replace(found, copies=10 * found.cycles)
    assert (most.cycles, most.limit) == (most.copies, "copies")


def test_a_last_wave_that_is_not_full_costs_a_whole_one() -> None:
    config = hopper_tiles.config_of("128x64s3")
    cycles = START + estimate(40, 2, config).cycles * 4096 / 64
    for maps, waves in ((4, 1), (5, 2)):  # 132 programs at a time, 32 a map
        flops = 2 * maps * 4096**2 * 40 * 3
        assert tflops(40, 2, config, maps, 4096) == pytest.approx(flops / (waves * cycles / CLOCK) / 1e12)


def test_names_of_tiles_are_configurations() -> None:
    config = hopper_tiles.config_of("256x32s4t")
    assert (config.block_m, config.block_n, config.stages, config.specialised, config.gluon) == (256, 32, 4, True, True)
    with pytest.raises(ValueError, match="expected tiles such as 128x64s3"):
        hopper_tiles.config_of("128x64w8s3")
