"""The row schema: what goes in comes out, and what cannot be right is refused."""

import dataclasses
import json

import pytest

from benchmarks.cases import LAYOUTS, OPS, Case, kernel_cases
from benchmarks.rows import Environment, Ratio, Row, merge, quantile, read, read_all, write
from benchmarks.unets import UNetCase

HERE = Environment(
    "cpu: a processor (2 cores)", 1, {"python": "3.11.7", "torch": "2.13.0"}, "0123456789ab", "2026-01-01"
)


def row(**values):
    about = {"suite": "kernels", "case": "sd15-512/64x8x160/pair-1/apply", "provider": "sdpa", "dtype": "float32"}
    return Row.new(HERE, **{**about, "status": "ok", "samples_ms": (1.0, 2.0, 4.0), **values})


def test_rows_survive_a_file(tmp_path):
    rows = [
        row(peak_mb=12.5, flops=10**12, limit_ms=0.5, error=1e-7, budget=2e-7),
        row(provider="fpe-torch", status="wrong", samples_ms=(), reason="relative error 1 exceeds its budget"),
        row(provider="flex", case="any", status="missing", samples_ms=(), reason="not installed: “flex”"),
    ]
    write(tmp_path / "cpu-kernels.json", rows)
    assert read(tmp_path / "cpu-kernels.json") == rows
    (tmp_path / "offline.json").write_text('{"not": "rows"}')
    assert read_all(tmp_path) == rows


def test_a_row_is_a_line(tmp_path):
    write(tmp_path / "rows.json", [row(), row(provider="unedited")])
    lines = (tmp_path / "rows.json").read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[1].rstrip(","))["provider"] == "sdpa"


@pytest.mark.parametrize("field", ["suite", "case", "provider", "device", "dtype", "versions", "commit", "threads"])
def test_every_part_of_the_key_tells_rows_apart(field):
    other = {"versions": {"torch": "2.14.0"}, "threads": 2}.get(field, "another")
    changed = dataclasses.replace(row(), **{field: other})
    assert changed.key != row().key
    assert merge([row()], [changed]) == [row(), changed]


def test_a_later_row_of_the_same_key_stands():
    assert merge([row()], [row(samples_ms=(9.0,))]) == [row(samples_ms=(9.0,))]


def test_a_file_with_a_key_twice_is_refused(tmp_path):
    write(tmp_path / "rows.json", [row()])
    content = json.loads((tmp_path / "rows.json").read_text())
    content["rows"] *= 2
    (tmp_path / "rows.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="same key"):
        read(tmp_path / "rows.json")


def test_another_schema_and_unknown_fields_are_refused(tmp_path):
    (tmp_path / "rows.json").write_text('{"schema": 99, "rows": []}')
    with pytest.raises(ValueError, match="schema 99"):
        read(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text('{"schema": 1, "rows": [{"speed": 1}]}')
    with pytest.raises(ValueError, match="speed"):
        read(tmp_path / "rows.json")


@pytest.mark.parametrize("status", ["wrong", "missing", "failed"])
def test_only_a_correct_row_carries_a_time(status):
    with pytest.raises(ValueError, match="carries no time"):
        row(status=status)


def test_statistics():
    assert row().median_ms == 2.0
    assert row(limit_ms=0.5).percent_of_limit == 25.0
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0
    assert row(status="missing", samples_ms=()).median_ms is None


def test_a_ratio_pairs_samples_of_the_same_round():
    fast, slow = row(samples_ms=(1.0, 10.0, 2.0)), row(samples_ms=(3.0, 20.0, 5.0))
    assert Ratio.of(fast, slow).median == 2.5
    with pytest.raises(ValueError, match="rounds that both took part in"):
        Ratio.of(fast, row(samples_ms=(1.0,)))


def test_case_names_read_back():
    cases = [Case("sd15", 512, 4096, 8, 40, t, layout, op) for t in (1, 8) for layout in LAYOUTS for op in OPS]
    for case in [*cases, *kernel_cases()]:
        assert Case.parse(case.name) == case
    assert len({case.name for case in kernel_cases()}) == len(kernel_cases())
    edit = UNetCase("sdxl", 1024, 4, "all", 50)
    assert UNetCase.parse(edit.name) == edit


def test_batches_are_laid_out_as_pipelines_lay_them_out():
    assert Case("m", 8, 1, 1, 8, 2, "pair").map_index == (0, 0, 0)
    assert Case("m", 8, 1, 1, 8, 1, "halves").map_index == (0, 0, 1, 1)
    assert Case("m", 8, 1, 1, 8, 2, "guided").map_index == (0, 1, 2, 3, 3, 3)


def test_work_is_counted_once_a_map():
    """One source and R - 1 targets: (1 + R) products of N² D multiply-adds, where unedited attention has 2 R."""
    pair = Case("m", 512, 4096, 8, 64, 1, "pair")
    product = 2 * 8 * 4096**2 * 64
    assert pair.flops == 3 * product
    assert pair.exponentials == 8 * 4096**2
