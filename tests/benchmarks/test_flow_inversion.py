"""The benchmark of flow inversions: what its rows say, and that they say it of these solvers."""

from itertools import product
from pathlib import Path

import pytest

from benchmarks import flow_inversion
from benchmarks.flow_inversion import random_sd3, run, steps_of
from benchmarks.measure import QUICK
from benchmarks.rows import read

pytest.importorskip("diffusers")
COMMITTED = Path(flow_inversion.__file__).parent / "results" / "cpu-flow-inversion.json"


@pytest.fixture(scope="module")
def pipe():
    return random_sd3()


@pytest.mark.parametrize(("solver", "calls"), [("euler", 16), ("rf-solver", 16), ("fireflow", 16)])
def test_calls_are_equal(pipe, solver, calls, monkeypatch):
    from fpe_pipeline import flow_scheduler

    pipe.scheduler = flow_scheduler(pipe.scheduler, solver)
    pipe.scheduler.set_timesteps(steps_of(solver, calls))
    assert len(pipe.scheduler.timesteps) == calls


@pytest.mark.slow
def test_rows(pipe, tmp_path):
    rows = {row.provider: row for row in run(pipe, "sd3-random", 16, QUICK)}
    assert list(rows) == ["euler", "rf-solver", "fireflow"]
    assert all(row.status == "ok" and row.samples_ms and row.suite == "flow-inversion" for row in rows.values())
    assert rows["fireflow"].error < rows["euler"].error and rows["rf-solver"].error < rows["euler"].error
    again = {row.provider: row for row in run(pipe, "sd3-random", 16, QUICK)}
    assert [rows[solver].error for solver in rows] == [again[solver].error for solver in rows]


def test_committed_rows():
    """At every number of calls that is large enough for the order of a solver to count."""
    errors = {(row.case, row.provider): row.error for row in read(COMMITTED)}
    for model, calls in product(("sd3-random/128x128", "embedded-sd3/64x64"), (16, 32, 64)):
        case = f"{model}/{calls} calls"
        assert max(errors[case, "rf-solver"], errors[case, "fireflow"]) < errors[case, "euler"]
