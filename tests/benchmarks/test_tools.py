"""The benchmark of drop-ins: a tool's rows, and that a wrong result gets no time."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import plot, tools, tools_cases, tools_long, tools_ways
from benchmarks.measure import Effort
from benchmarks.rows import ROOT, read, write
from benchmarks.table_parts import DENSE, UNEDITED
from benchmarks.tools_cases import LONG, TOOLS, Step
from benchmarks.tools_table import PAGES, TABLES

pytest.importorskip("diffusers")
SHORT = Effort(rounds=1, least_rounds=1, seconds=0.1, sample_ms=1.0, calls_a_sample=1)
#: Tools that are asked for maps later, or for a loss of their numbers.
NUMBERS = {"attention-map-diffusers", "pix2pix-zero"}
COMMITTED = plot.RESULTS / "cpu-tools.json"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", TOOLS)
def test_ours_agree_with_the_original(tool):
    rows = {row.provider: row for row in tools.run(tool, 16, SHORT)}
    assert {"fpe", DENSE} <= rows.keys()
    assert all(row.status == "ok" and row.samples_ms and row.peak_mb for row in rows.values())
    assert rows["fpe"].error <= rows["fpe"].budget


def plain(step, dense_bytes=0):
    from contextlib import nullcontext

    def doubled():
        return _Scaled()

    return Step(lambda: torch.full((4,), _Scaled.factor * 1.0), doubled, nullcontext, dense_bytes)


class _Scaled:
    """A block in which a step gives twice as much."""

    factor = 1

    def __enter__(self):
        _Scaled.factor = 2

    def __exit__(self, *error):
        _Scaled.factor = 1


def test_a_wrong_result_gets_no_time(monkeypatch):
    monkeypatch.setitem(TOOLS, "wrong", lambda side, device: plain(None))
    (row,) = tools.run("wrong", 16, SHORT)
    assert (row.status, row.samples_ms, row.error) == ("wrong", (), 1.0)


def test_maps_that_are_too_large_are_missing(monkeypatch):
    monkeypatch.setitem(TOOLS, "large", lambda side, device: plain(None, 2 * tools_ways.MOST))
    rows = {row.provider: row for row in tools.run("large", 16, SHORT)}
    assert rows[DENSE].status == "missing"
    assert "its maps are 24 GiB" in rows[DENSE].reason
    assert rows["fpe"].status == rows[UNEDITED].status == "ok"
    assert "missing" in TABLES["tools-cpu"](list(rows.values()))


@pytest.mark.filterwarnings("ignore")
def test_long_calls_share_what_is_the_same(monkeypatch):
    """Three samples of ours, three of the step without a tool for all of them together, and one of the original."""
    monkeypatch.setattr("benchmarks.memory.gc.collect", lambda: 0)  # of a whole test run, it takes a second
    calls = []

    def counting(name):
        def make(side, device):
            case = plain(None)
            return replace(case, step=lambda: calls.append(name) or case.step(), shared="same", dense=case.ours)

        return make

    for name in ("one", "two"):
        monkeypatch.setitem(TOOLS, name, counting(name))
    monkeypatch.setitem(TOOLS, "wrong", lambda side, device: plain(None))
    assert tools_long.groups(["one", "wrong", "two"]) == [["one", "two"], ["wrong"]]
    rows = {(row.case, row.provider): row for row in tools_long.run_together(["one", "two"], LONG)}
    assert calls.count("one") == 3 + 1 + 3
    assert calls.count("two") == 3 + 1
    for name in ("one", "two"):
        case = f"{name}/128x128, unguided"
        assert {way: len(rows[case, way].samples_ms) for way in ("fpe", DENSE, UNEDITED)} == {
            "fpe": 3,
            DENSE: 1,
            UNEDITED: 3,
        }
        assert rows[case, "fpe"].error == 0
    assert "(one call) × time" in TABLES["tools-cpu"](list(rows.values()))
    (row,) = tools_long.run_together(["wrong"], LONG)
    assert (row.status, row.samples_ms, row.error) == ("wrong", (), 1.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool not in ("ledits++", "sag")])
def test_without_guidance_ours_agree_with_the_original(tool, monkeypatch):
    """As at the sizes where there is none."""
    monkeypatch.setattr(tools_cases, "LONG", 16)
    rows = {row.provider: row for row in tools_long.run_together([tool], 16)}
    assert rows["fpe"].status == "ok" and rows["fpe"].error <= rows["fpe"].budget
    assert {len(rows[way].samples_ms) for way in ("fpe", UNEDITED)} == {3}


@pytest.mark.filterwarnings("ignore")
def test_a_file_keeps_other_cases(tmp_path, monkeypatch):
    """And drops those of a name that is measured no more."""
    for name in ("one", "two"):
        monkeypatch.setitem(TOOLS, name, lambda side, device: replace(plain(None), dense=plain(None).ours))
    monkeypatch.setattr(tools, "run", partial(tools.run, effort=SHORT))
    monkeypatch.setattr("benchmarks.memory.gc.collect", lambda: 0)
    path = tmp_path / "rows.json"
    tools.main(["--tools", "one", "two", "--sides", "8", "--output", str(path)])
    (first, *_) = rows = read(path)
    write(path, [*rows, replace(first, case="one/128x128"), replace(first, case="three/8x8")])
    tools.main(["--tools", "two", "--sides", "8", "--output", str(path)])
    assert [row.case for row in read(path)] == ["one/8x8"] * 3 + ["two/8x8"] * 3


def test_every_tool_has_its_rows_on_a_page():
    assert sorted(tool for tools_ in PAGES.values() for tool in tools_) == sorted(TOOLS)
    for page in PAGES:
        assert f"<!-- table: tools-cpu-{page} -->" in (ROOT / f"docs/compat/{page}.md").read_text(encoding="utf-8")
    assert {path.stem for path in (ROOT / "docs/compat").glob("*.md")} == {"README", *PAGES}


def test_committed_rows():
    """Nothing that needs no numbers holds more than a tenth above the step without a tool, at 4096 tokens."""
    rows = {(row.case, row.provider): row for row in read(COMMITTED)}
    for tool in TOOLS.keys() - NUMBERS:
        case = f"{tool}/64x64"
        assert rows[case, "fpe"].peak_mb <= 1.1 * rows[case, UNEDITED].peak_mb
    for tool in TOOLS:
        assert rows[f"{tool}/64x64", "fpe"].status == rows[f"{tool}/64x64", DENSE].status == "ok"
