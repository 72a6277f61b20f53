"""Scoring of edits: which pairs are drawn, what the statistics say, and that a run can be continued."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from fpe_pipeline.embedded import embedded_path, judge_path
from fpe_pipeline.embedded.judge import load_judge
from fpe_pipeline.embedded.scenes import scenes
from fpe_pipeline.errors import InputError
from fpe_pipeline.quality import (
    Condition,
    bootstrap_interval,
    evaluate,
    held_out_pairs,
    run,
    share_interval,
    standard_conditions,
    summarise,
    sweep_conditions,
)
from fpe_pipeline.quality import command as command_module
from fpe_pipeline.quality.store import ScoreFile, dump, fingerprint, packed, unpacked
from fpe_pipeline.quality.study.report import plot, table
from fpe_pipeline.quality.study.scores import Score
from tests.support.tiny_cli import evaluation


class TestPairs:
    def test_sources_are_held_out_and_one_attribute_changes(self):
        place = {"object": 0, "colour": 1, "background": 2}
        for pair in held_out_pairs(40):
            assert scenes.held_out(*pair.source)
            changed = [i for i in range(3) if pair.source[i] != pair.target[i]]
            assert changed == [place[pair.kind]]
            assert pair.seed != pair.other_seed

    def test_longer_lists_begin_with_the_shorter_ones_and_cover_all_sources(self):
        assert held_out_pairs(5, seed=3) == held_out_pairs(50, seed=3)[: 3 * 5]
        colour = [pair.source for pair in held_out_pairs(32, ["colour"])]
        assert sorted(colour) == sorted(scenes.triples(held=True))

    def test_bad_requests(self):
        with pytest.raises(ValueError, match="unknown kinds"):
            held_out_pairs(3, ["mood"])
        with pytest.raises(ValueError, match="at least one"):
            held_out_pairs(0)


class TestStatistics:
    def test_interval_covers_the_mean_and_is_seeded(self):
        values = np.random.default_rng(0).normal(1.0, 0.5, 400)
        low, high = bootstrap_interval(values)
        assert low < values.mean() < high
        # 1.96 standard errors each way, as for a mean of normal values
        assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)
        assert bootstrap_interval(values) == (low, high)
        with pytest.raises(ValueError, match="non-empty"):
            bootstrap_interval(np.array([]))

    @pytest.mark.parametrize("successes", [0, 3, 6, 190])
    def test_interval_of_a_share_holds_those_that_do_not_exclude_it(self, successes):
        """Its ends are the shares from which what was seen is 1.96 of their own standard deviations away."""
        trials = 6 if successes <= 6 else 200
        low, high = share_interval(successes, trials)
        assert 0.0 <= low <= successes / trials <= high <= 1.0 and high - low > 0.0
        for end in (low, high):
            if 0.0 < end < 1.0:
                deviation = (end * (1 - end) / trials) ** 0.5
                assert abs(successes / trials - end) == pytest.approx(1.96 * deviation, rel=1e-4)

    def test_a_share_of_nothing_is_refused(self):
        with pytest.raises(ValueError, match="0 of 0"):
            share_interval(0, 0)

    def test_gain_is_paired(self):
        rng = np.random.default_rng(1)
        base = rng.uniform(0.1, 0.5, 60)
        rows = [row for i, b in enumerate(base) for row in (_row(i, "shared noise", b), _row(i, "edit", b + 0.2))]
        entry = summarise(rows)["colour"]["edit"]
        assert entry["gain_over_shared_noise"] == {"mean": 0.2, "low": 0.2, "high": 0.2}
        assert entry["iou"]["high"] - entry["iou"]["low"] > 0.02
        assert entry["success"]["mean"] == 1.0

    def test_table_and_plot_show_every_condition(self, tmp_path):
        summary = summarise([_row(0, "shared noise", 0.4), _row(0, "edit", 0.7)])
        text = table(summary)
        assert "| colour | edit | 1 | 100.0 % [20.6, 100.0]" in text and "+0.300" in text
        plot(summary, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 1000


def test_an_edit_needs_shared_noise():
    with pytest.raises(ValueError, match="source's noise"):
        Condition("wrong", standard_conditions()[-1].edit, shared_noise=False)


@pytest.mark.slow
def test_conditions_drawn_in_one_batch_are_those_drawn_alone():
    pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
    pipe.set_progress_bar_config(disable=True)
    judge = load_judge(judge_path())
    pairs = held_out_pairs(1, ["object"])
    conditions = [*standard_conditions(0.5), *sweep_conditions(windows=(1.0,), levels=(1,), self_replace_steps=0.7)]
    together = evaluate(pipe, judge, pairs, conditions, steps=2)
    alone = [evaluate(pipe, judge, pairs, [condition], steps=2)[0] for condition in conditions]
    assert [score.condition for score in together] == [condition.name for condition in conditions]
    for a, b in zip(together, alone, strict=True):
        # Eight-bit pictures may differ by a rounding where the batch changes the order of sums.
        assert (a.iou, a.outside_psnr) == pytest.approx((b.iou, b.outside_psnr), rel=1e-2)
    psnr = {score.condition: score.outside_psnr for score in together}
    assert len(set(psnr.values())) == len(psnr), "two conditions drew the same picture"


def test_interrupted_run_continues_and_refuses_other_settings(tmp_path, monkeypatch):
    calls = []

    def evaluate(pipe, judge, pairs, conditions, *, first, on_chunk, **_):
        calls.append((first, len(pairs)))
        for index, pair in enumerate(pairs):
            if len(calls) == 1 and index == 2:
                raise KeyboardInterrupt
            scores = [Score(first + index, pair.kind, c.name, *6 * [True], 0.5, 30.0) for c in conditions]
            on_chunk(scores)

    monkeypatch.setattr(command_module, "evaluate", evaluate)
    monkeypatch.setattr(command_module, "fingerprint", lambda folder: "weights")
    monkeypatch.setattr(command_module, "_load", lambda *_: (None, None))
    arguments = ["--pairs", "2", "-o", str(tmp_path / "out")]
    with pytest.raises(KeyboardInterrupt):
        run(evaluation(*arguments))
    assert run(evaluation(*arguments)) == 0
    assert calls == [(0, 6), (2, 4)]
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(result["scores"]["rows"]) == 6 * 3
    assert result["summary"]["object"]["free-prompt editing"]["pairs"] == 2
    with pytest.raises(InputError, match="other settings"):
        run(evaluation(*arguments, "--steps", "7"))

    with monkeypatch.context() as patch, pytest.raises(InputError, match="other settings"):
        patch.setattr(command_module, "pick_device", lambda device: device)
        run(evaluation(*arguments, "--device", "cuda"))  # where the model is one in half precision

    # Fewer pairs are a table of fewer, as its settings say; the others are kept.
    assert run(evaluation("--pairs", "1", "-o", str(tmp_path / "out"))) == 0
    fewer = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert fewer["settings"]["pairs"] == fewer["summary"]["object"]["free-prompt editing"]["pairs"] == 1
    assert fewer["scores"]["rows"] == result["scores"]["rows"][: 3 * 3]
    assert run(evaluation(*arguments)) == 0 and len(calls) == 2
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result


def test_a_kind_may_have_any_name():
    rows = [{"pair": 0, "kind": "ROWS"}, {"pair": 1, "kind": "ROWS"}]
    result = {"summary": {"ROWS": 1}, "scores": packed(rows)}
    again = json.loads(dump(result))
    assert again["summary"] == {"ROWS": 1} and unpacked(again["scores"]) == rows


def _row(pair: int, condition: str, iou: float) -> dict:
    return Score(pair, "colour", condition, *6 * [True], float(iou), 30.0).to_json()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_other_weights_are_another_model(tmp_path, suffix):
    """However they are written: scores of one model are not continued by another."""
    path = tmp_path / "unet" / f"diffusion_pytorch_model.{suffix}"
    path.parent.mkdir()
    seen = set()
    for content in (b"one", b"other"):
        path.write_bytes(content)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 2


def test_two_runs_into_one_folder_do_not_mix_their_scores(tmp_path):
    first, second = (ScoreFile(tmp_path / "scores.jsonl", {"steps": 2}) for _ in range(2))
    first.add({"pair": 0})
    with pytest.raises(InputError, match=r"another run writes to .* wait until that one ends and run this one again"):
        second.add({"pair": 0})
    first.add({"pair": 1})
    again = ScoreFile(tmp_path / "scores.jsonl", {"steps": 2})
    assert again.rows == [{"pair": 0}, {"pair": 1}]
    again.keep(1)
    again.add({"pair": 1})
    assert again.rows == ScoreFile(tmp_path / "scores.jsonl", {"steps": 2}).rows


def test_weights_are_read_a_piece_at_a_time(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(2**24))
    tracemalloc.start()
    try:
        fingerprint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["scheduler/scheduler_config.json", "tokenizer/vocab.json"])
def test_scores_of_a_model_set_up_otherwise_are_not_continued(tmp_path, monkeypatch, changed):
    """Another scheduler or vocabulary with the same weights draws other pictures."""
    model = tmp_path / "model"
    shutil.copytree(embedded_path("embedded"), model, copy_function=os.symlink)

    def evaluate(pipe, judge, pairs, conditions, *, first, on_chunk, **_):
        for index, pair in enumerate(pairs, start=first):
            on_chunk([Score(index, pair.kind, c.name, *6 * [True], 0.5, 30.0) for c in conditions])

    monkeypatch.setattr(command_module, "evaluate", evaluate)
    monkeypatch.setattr(command_module, "_load", lambda *_: (None, None))
    arguments = ["--model", str(model), "-o", str(tmp_path / "out")]
    assert run(evaluation(*arguments, "--pairs", "1")) == 0
    assert run(evaluation(*arguments, "--pairs", "2")) == 0
    text = (model / changed).read_text()
    (model / changed).unlink()
    (model / changed).write_text(json.dumps(json.loads(text) | {"other": 1}))
    with pytest.raises(InputError, match="other settings"):
        run(evaluation(*arguments, "--pairs", "3"))
