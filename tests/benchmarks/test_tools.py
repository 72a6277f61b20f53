"""The benchmark of drop-ins: a tool's rows, and that a wrong result gets no time."""

import pytest
import torch

from benchmarks import plot, tools
from benchmarks.measure import Effort
from benchmarks.rows import read
from benchmarks.table_parts import DENSE, UNEDITED
from benchmarks.tools_cases import TOOLS, Step
from benchmarks.tools_table import TABLES

pytest.importorskip("diffusers")
SHORT = Effort(rounds=1, least_rounds=1, seconds=0.1, sample_ms=1.0, calls_a_sample=1)
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
    monkeypatch.setitem(TOOLS, "large", lambda side, device: plain(None, 2 * tools.MOST))
    rows = {row.provider: row for row in tools.run("large", 16, SHORT)}
    assert rows[DENSE].status == "missing"
    assert "its maps are 10 GiB" in rows[DENSE].reason
    assert rows["fpe"].status == rows[UNEDITED].status == "ok"
    assert "missing" in TABLES["tools-cpu"](list(rows.values()))


def test_committed_rows():
    """Nothing that needs no numbers holds more than a tenth above the step without a tool, at 4096 tokens."""
    rows = {(row.case, row.provider): row for row in read(COMMITTED)}
    for tool in ("free-prompt-editing", "masactrl", "pnp-diffusers", "style-aligned", "daam"):
        case = f"{tool}/64x64"
        assert rows[case, "fpe"].peak_mb <= 1.1 * rows[case, UNEDITED].peak_mb
    for tool in TOOLS:
        assert rows[f"{tool}/64x64", "fpe"].status == rows[f"{tool}/64x64", DENSE].status == "ok"
