"""The study of every method: evaluations put side by side, and tables that say what the committed scores say."""

from __future__ import annotations

import json

import pytest

from benchmarks import plot, quality_methods
from benchmarks.quality_methods import RESULTS, combined
from fpe_pipeline.quality.methods.comparison import MethodScore
from fpe_pipeline.quality.methods.contenders import CONTENDERS
from fpe_pipeline.quality.methods.tally import ALL, compare
from fpe_pipeline.quality.store import packed, unpacked

STUDY = RESULTS / "methods.json"


def evaluation(images: str, origin: str, iou: float, steps: int = 25) -> dict:
    scores = [
        MethodScore(f"colour-{n}", "colour", origin, method, True, iou, 25.0, 31.0 + n, 2.0, 1.0, 31.5).to_json()
        for n in range(2)
        for method in ("no edit", "fpe")
    ]
    settings = {"images": images, "steps": steps, "guidance": 5.0, "seed": 0, "device": "cpu", "weights": "abc"}
    settings["methods"] = {"fpe": "x"}
    return {"settings": settings, "environment": {"torch": "2.13"}, "summary": {}, "scores": packed(scores)}


def test_evaluations_stand_side_by_side(tmp_path, monkeypatch):
    study = combined([evaluation("generated", "generated", 0.4), evaluation("held-out", "ddim", 0.8)])
    monkeypatch.setattr(quality_methods, "RESULTS", tmp_path)
    assert "not measured yet" in plot.TABLES["methods"]([])
    (tmp_path / "methods.json").write_text(json.dumps(study))
    full, short, inversions = (plot.TABLES[name]([]) for name in ("methods", "methods-short", "methods-inversions"))
    assert "| 2 | 100 % [34, 100] | 0.40 [0.40, 0.40] | 25.0 [25.0, 25.0] | 2.00 | 2 | 100 % [34, 100] | 0.80" in full
    assert "| fpe | 2 | 100 % [34, 100] | 0.40 [0.40, 0.40] | 2 | 100 % [34, 100] | 0.80 [0.80, 0.80] |" in short
    assert "| ddim | 2 | 31.5 [31.0, 32.0] | 31.00 | 31.5 [31.5, 31.5] | 31.50 | 1.00 | 2 | 100 %" in inversions
    assert "| null-text | 0 | not measured yet | – | – | – | – | – | – | – | – |" in inversions
    assert "generated: 2 colour; ddim: 2 colour" in full and "fpe: x" in full


def test_evaluations_that_do_not_belong_together_are_refused():
    one = evaluation("generated", "generated", 0.4)
    with pytest.raises(ValueError, match="differ in steps"):
        combined([one, evaluation("held-out", "ddim", 0.8, steps=50)])
    with pytest.raises(ValueError, match="same images: generated, generated"):
        combined([one, one])


@pytest.fixture(scope="module")
def study():
    return json.loads(STUDY.read_text())


def test_the_committed_summary_is_that_of_the_committed_scores(study):
    assert study["summary"] == compare(unpacked(study["scores"]), seed=study["settings"]["seed"])


def test_no_method_is_missing(study):
    for origin in ("generated", "ddim"):
        assert set(study["summary"][origin]["kinds"][ALL]) == set(CONTENDERS)


def test_a_real_image_comes_back_from_its_reference_latents(study):
    """Without an edit, as well as the autoencoder can: what "direct" ends with, and "ddim" nearly."""
    assert study["summary"]["ddim"]["reconstruction"]["mean"] >= 30
    for row in unpacked(study["scores"]):
        if row["reconstruction"] is not None and row["origin"] in ("ddim", "direct"):
            allowed = 0.01 if row["origin"] == "direct" else 0.25
            assert row["reconstruction"] == pytest.approx(row["autoencoder"], abs=allowed), row
