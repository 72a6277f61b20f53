"""Evaluations joined into a study: kinds side by side, and no mixing of settings."""

from __future__ import annotations

import pytest

from benchmarks.quality import about, joined


def evaluation(kind: str, pairs: int, steps: int = 25) -> dict:
    figure = {"mean": 0.5, "low": 0.4, "high": 0.6}
    settings = {"pairs": pairs, "kinds": [kind], "steps": steps, "guidance": 5.0, "self_replace": 0.8, "seed": 0}
    return {
        "settings": {**settings, "weights": "abc"},
        "environment": {"torch": "2.13", "machine": "x"},
        "summary": {kind: {"shared noise": {"pairs": pairs, "iou": figure}}},
        "scores": {"columns": ["pair"], "rows": [[index] for index in range(pairs)]},
    }


def test_kinds_stand_side_by_side_and_are_counted():
    study = joined([evaluation("colour", 3), evaluation("object", 2)])
    assert list(study["summary"]) == ["colour", "object"]
    assert len(study["scores"]["rows"]) == 5
    assert "3 colour, 2 object" in about(study)


def test_evaluations_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="differ in steps"):
        joined([evaluation("colour", 3), evaluation("object", 2, steps=50)])
    with pytest.raises(ValueError, match="two evaluations hold colour"):
        joined([evaluation("colour", 3), evaluation("colour", 2)])
