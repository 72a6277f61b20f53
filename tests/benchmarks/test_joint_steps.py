"""Steps of transformers: every editor is held against the same edit in float64, and a wrong one gets no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import joint_steps
from benchmarks.joint_editors import EDITORS
from benchmarks.joint_models import JointCase
from benchmarks.joint_steps import SMALL, run
from benchmarks.measure import QUICK
from benchmarks.rows import Ratio, read
from benchmarks.tables import TABLES

pytest.importorskip("diffusers")
COMMITTED = Path(joint_steps.__file__).parent / "results" / "cpu-joint-steps.json"
FAST = replace(QUICK, rounds=2, least_rounds=2, seconds=0.1, calls_a_sample=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.family)
def test_rows(case: JointCase):
    rows = {row.provider: row for row in run(case, FAST)}
    assert list(rows) == [*EDITORS, "attention"]
    assert all(row.status == "ok" and len(row.samples_ms) == 2 for row in rows.values()), rows
    assert all(0 < row.error <= row.budget and row.peak_mb for name, row in rows.items() if name != "attention")
    assert f"{case.family}, {case.side**2}+{case.texts} tokens" in TABLES["joint-steps-cpu"](list(rows.values()))


def test_an_edit_that_is_not_made_is_wrong(monkeypatch):
    monkeypatch.setitem(EDITORS, "fpe", EDITORS["unedited"])
    (row,) = (row for row in run(SMALL[0], FAST, names=["fpe"]) if row.provider == "fpe")
    assert row.status == "wrong" and "exceeds its budget" in row.reason


def test_committed_rows():
    """What is asked of an edited step beside the unedited one, of the rows that there are."""
    cases: dict[str, dict[str, object]] = {}
    for row in read(COMMITTED):
        cases.setdefault(row.case, {})[row.provider] = row
    assert any("4096+333" in case for case in cases)
    for rows in cases.values():
        ratio = Ratio.of(rows["unedited"], rows["fpe"])
        assert ratio.median > 0 and rows["fpe"].peak_mb <= 1.05 * rows["unedited"].peak_mb
