"""The benchmark of busy machines: rows for every level and number of threads, none of which stands for another."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch

from benchmarks import busy
from benchmarks.cases import Case
from benchmarks.rows import read, replaced, write
from benchmarks.tables import TABLES


def told(monkeypatch, **variables: str) -> None:
    for variable in busy.CAPABILITIES["avx2"]:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)


def test_every_level_and_number_of_threads_has_rows_of_its_own(tmp_path, monkeypatch):
    told(monkeypatch)
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


def test_a_capability_is_one_of_all_libraries(monkeypatch):
    told(monkeypatch)
    assert busy.capability() == ""
    told(monkeypatch, ATEN_CPU_CAPABILITY="avx2")
    with pytest.raises(RuntimeError, match="--capability avx2"):
        busy.capability()
    told(monkeypatch, **busy.CAPABILITIES["avx2"])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert busy.capability() == "avx2"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(RuntimeError, match="on a processor that can"):
        busy.capability()


def test_a_capability_takes_a_process_of_its_own(monkeypatch):
    told(monkeypatch)
    started = []

    def run(command, env, **others):
        started.append((command[1:], {name: env[name] for name in busy.CAPABILITIES["avx2"]}))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert busy.main(["--capability", "avx2", "--levels", "0"]) == 3
    command = ["-m", "benchmarks.busy", "--capability", "avx2", "--levels", "0"]
    assert started == [(command, busy.CAPABILITIES["avx2"])]


def test_rows_of_another_capability_stand_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("benchmarks.measure").measure.CACHE_BYTES, "cpu", 2**16)
    told(monkeypatch)
    small = Case("busy", 64, 64, 2, 8, 1, "pair")
    (own,) = busy.measure([small], pairs=3, levels=(0,), threads=(1,))
    monkeypatch.setattr(busy, "capability", lambda: "avx2")
    (limited,) = busy.measure([small], pairs=3, levels=(0,), threads=(1,))
    assert [row.case for row in limited] == [f"{row.case}/avx2" for row in own]
    kept = replaced(own, limited)
    write(tmp_path / "cpu-busy.json", kept)
    assert len(read(tmp_path / "cpu-busy.json")) == 4
    table = TABLES["busy-cpu"]([*kept, *(replace(row, case=row.case.replace("busy-0", "busy-1")) for row in limited)])
    own_line, limited_line = table.splitlines()[2:4]
    assert own_line.startswith("| 64 × 2 × 8 | 1 |") and own_line.endswith("| – | – |")
    assert limited_line.startswith("| 64 × 2 × 8, AVX2 only | 1 |") and limited_line.endswith(") | – |")
