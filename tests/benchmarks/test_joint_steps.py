"""Steps of transformers: every editor is held against the same edit in float64, and a wrong one gets no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import joint_steps
from benchmarks.joint_editors import EDITORS
from benchmarks.joint_models import JointCase
from benchmarks.joint_steps import GPU_CASES, SMALL, run
from benchmarks.measure import QUICK
from benchmarks.rows import Ratio, read
from benchmarks.run import Bench
from benchmarks.tables import TABLES

pytest.importorskip("diffusers")
COMMITTED = Path(joint_steps.__file__).parent / "results" / "cpu-joint-steps.json"
FAST = Bench("cpu", torch.float32, replace(QUICK, rounds=2, least_rounds=2, seconds=0.1, calls_a_sample=1))


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.family)
def test_rows(case: JointCase):
    rows = {row.provider: row for row in run(FAST, case)}
    assert list(rows) == ["kept", *EDITORS, "attention"]
    assert all(row.status == "ok" for row in rows.values()), rows
    assert all(len(row.samples_ms) == 2 for name, row in rows.items() if name != "kept")
    assert all(0 < rows[name].error <= rows[name].budget and rows[name].peak_mb for name in EDITORS)
    width = case.heads * (64 if case.family == "sd3" else 128)
    layers = case.layers * (1 if case.family == "sd3" else 2)
    assert rows["kept"].peak_mb == 1e-6 * layers * 2 * case.tokens * width * 4
    assert f"{case.family}, {case.side**2}+{case.texts} tokens" in TABLES["joint-steps-cpu"](list(rows.values()))


def test_an_edit_that_is_not_made_is_wrong(monkeypatch):
    monkeypatch.setitem(EDITORS, "fpe", EDITORS["unedited"])
    (row,) = (row for row in run(FAST, SMALL[0], names=["fpe"]) if row.provider == "fpe")
    assert row.status == "wrong" and "exceeds its budget" in row.reason


def test_committed_rows():
    """What is asked of an edited step beside the unedited one, of the rows that there are."""
    cases: dict[str, dict[str, object]] = {}
    for row in read(COMMITTED):
        cases.setdefault(row.case, {})[row.provider] = row
    assert {case.split("/")[-1] for case in cases if "4096+333" in case} == {"1", "3"}
    for name, rows in cases.items():
        ratio = Ratio.of(rows["unedited"], rows["fpe"])
        if "8192+512" not in name:  # beside Kontext's reference picture, whose keys are each row's own
            assert ratio.high <= 1.02 if name.endswith("/1") else ratio.high < 1.0, name
        assert rows["fpe"].peak_mb <= 1.05 * rows["unedited"].peak_mb
        assert rows["fpe"].peak_mb < rows["dense-original"].peak_mb
        assert rows["attention"].status == rows["kept"].status == rows["stored"].status == "ok"


def test_pictures_in_a_row_are_tokens_of_their_own():
    """FLUX.1 Kontext's reference lies beside the latents, at places of its own."""
    case = next(case for case in GPU_CASES if case.images == 2)
    assert case.name.startswith("flux/8192+512/")
    small = replace(case, side=4, heads=1, layers=1, texts=5)
    rows = run(FAST, small, names=["unedited", "fpe", "stored"])
    assert [row.status for row in rows] == ["ok"] * 5, rows


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.family)
def test_a_step_from_what_was_stored_makes_no_index(case: JointCase):
    """On a GPU an index that each step brings from the host would have the rival wait, and not us."""
    with joint_steps.step_of(FAST, case, "stored") as step, torch.no_grad(), Asked() as asked:
        step()
    assert (case.rows,) not in asked.ranges


class Asked(torch.overrides.TorchFunctionMode):
    """Arguments of `torch.arange` within the block."""

    def __init__(self):
        super().__init__()
        self.ranges = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.ranges += [args] if function is torch.arange else []
        return function(*args, **(kwargs or {}))
