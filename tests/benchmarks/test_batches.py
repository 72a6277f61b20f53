"""The suite of batches: its cases have ten targets, wrong pictures get no time, and the claim is borne by its rows."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from benchmarks import batches
from benchmarks.measure import Effort
from benchmarks.rows import ROOT, Ratio, read_all
from benchmarks.tables import TABLES, grouped

SMALL = batches.SharedSource("fpe", targets=3, side=64, steps=1)


def test_ten_targets_of_one_source():
    for case in batches.batches_plan():
        jobs = batches.jobs_of(case, "cpu", "float32")
        assert len({job.target for job in jobs}) == 10 and len({job.settings.source for job in jobs}) == 1


@pytest.mark.slow
def test_a_planted_picture_gets_no_time(monkeypatch):
    (single, batch) = batches.run_batches("cpu", Effort(rounds=1, least_rounds=1), [SMALL])
    assert (single.provider, batch.provider, batch.status) == (batches.SINGLE, batches.BATCH, "ok")
    assert len(single.samples_ms) == len(batch.samples_ms)
    from fpe_pipeline.runs import run as runs

    execute, swapped = runs.execute, []

    def other_seed(settings, **options):
        swapped.append(1)
        return execute(settings.with_values(seed=1) if len(swapped) == 2 else settings, **options)

    monkeypatch.setattr(runs, "execute", other_seed)
    (wrong, _) = batches.run_batches("cpu", Effort(rounds=1, least_rounds=1), [SMALL])
    assert (wrong.provider, wrong.status) == (batches.BATCH, "wrong") and "levels from the single edit" in wrong.reason


def test_sharing_a_source_is_as_fast_as_documents_say():
    cases = grouped(read_all(ROOT / "benchmarks" / "results"), "batches", False)
    for providers in cases.values():
        assert Ratio.of(providers[batches.BATCH], providers[batches.SINGLE]).median >= 1.5
    assert ("not measured" in TABLES["batches-cpu"]([])) and "batch" in (ROOT / "docs" / "batches.md").read_text()
