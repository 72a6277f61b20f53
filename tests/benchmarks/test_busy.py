"""The benchmark of busy machines: rows for every level and number of threads, none of which stands for another."""

import json

from benchmarks import busy
from benchmarks.cases import Case
from benchmarks.rows import read, write
from benchmarks.tables import TABLES


def test_every_level_and_number_of_threads_has_rows_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("benchmarks.measure").measure.CACHE_BYTES, "cpu", 2**16)
    small = Case("busy", 64, 64, 2, 8, 1, "pair")
    rows = [row for rows in busy.measure([small], pairs=3, levels=(0, 1), threads=(2, 1)) for row in rows]
    path = tmp_path / "cpu-busy.json"
    write(path, rows)
    kept = read(path)
    assert {(row.case, row.threads) for row in kept} == {
        (f"{small.name}/busy-{level}/{threads}-threads", threads) for level in (0, 1) for threads in (1, 2)
    }
    assert all(len(row.samples_ms) == 3 for row in kept)
    table = TABLES["busy-cpu"](kept)
    assert table.count("| 64 × 2 × 8 |") == 2
    assert json.loads(path.read_text())["rows"]


def test_a_process_that_keeps_a_core_busy_ends_with_the_block():
    with busy.busy(1):
        pass
