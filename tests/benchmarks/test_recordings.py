"""What the suite of recordings plans, on the model that it is measured with."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from benchmarks import recordings
from benchmarks.measure import Effort
from fpe_pipeline import FreePromptPipeline
from fpe_pipeline.embedded import embedded_path
from fpe_pipeline.models.sites import attention_sites


def test_every_planned_edit_has_layers_in_the_embedded_model() -> None:
    pipe = FreePromptPipeline.from_pretrained(embedded_path())
    for case in recordings.recordings_plan():
        side = case.side // pipe.vae_scale_factor
        sites = tuple(site.at(side, side) for site in attention_sites(pipe.unet))
        assert recordings.edit_of(case, pipe.tokenizer).select(sites)


def test_a_case_that_cannot_be_recorded_does_not_end_the_suite(monkeypatch) -> None:
    monkeypatch.setattr(recordings, "OPTIONS", {"masactrl": {"start_layer": 99}})
    (row,) = recordings.run_recordings("cpu", Effort(), [recordings.RecordedEdit("masactrl", 80, 2)])
    assert row.status == "failed" and "start_layer=99" in row.reason
