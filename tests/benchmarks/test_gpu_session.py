"""`make gpu` on a machine without one: its arithmetic, and a dry run of the real thing."""

import os
import subprocess
import sys

import pytest

from benchmarks.gpu_session import BUDGET, GRACE, STAGES, SUMMARY, Stage, schedule, summarise
from benchmarks.tune import ALL, BOUNDED, DESCRIBED, SPECIALISED, choices, tuning_plan


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run_with(stages, budget, takes):
    clock, given = Clock(), {}

    def run(stage, seconds):
        given[stage.name] = seconds
        clock.now += takes(stage, seconds)

    schedule(stages, run, budget, clock)
    return given, clock.now


def test_stages_that_use_all_their_time_stay_within_the_budget():
    given, end = run_with(STAGES, BUDGET, lambda stage, seconds: seconds)
    assert end == pytest.approx(BUDGET)
    assert given["kernels"] == pytest.approx(BUDGET * 0.26)


def test_even_stages_that_overrun_end_within_nine_minutes():
    """A stage is killed `GRACE` after its time; what it took comes out of what the later ones share."""
    given, end = run_with(STAGES, BUDGET, lambda stage, seconds: seconds + GRACE)
    assert end <= 540
    assert all(seconds > 5 for seconds in given.values())


def test_unused_time_moves_on():
    stages = (Stage("a", 0.5, "a.txt"), Stage("b", 0.25, "b.txt"), Stage("c", 0.25, "c.txt"))
    given, _ = run_with(stages, 100.0, lambda stage, seconds: 0.0)
    assert given == {"a": 50.0, "b": 50.0, "c": 100.0}


def test_the_result_folder_has_few_files():
    files = {stage.file for stage in STAGES[1:]} | {SUMMARY}
    assert len(files) == len(STAGES) <= 8
    assert not any("/" in name for name in files)


def test_a_session_that_measured_nothing_still_has_a_summary(tmp_path):
    text = summarise(tmp_path, {"correctness": "FAILED (exit status 1), 3 s"})
    assert "correctness: FAILED" in text


def test_candidates_fit_a_multiprocessor():
    for case in tuning_plan():
        if case.layout == "guided":
            continue
        chosen = choices(case, "sm_100")
        assert 4 <= len(chosen) <= len(ALL) + len(BOUNDED) + len(DESCRIBED) + len(SPECIALISED)
        assert set(choices(case, "sm_120")) <= set(chosen)


def test_without_a_gpu_every_stage_says_why_it_is_skipped(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--out", str(tmp_path), "--device", "cpu"]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert finished.stdout.count("skipped: needs a CUDA device") >= len(STAGES)


@pytest.mark.slow
def test_a_dry_run_leaves_every_file(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--dry-run", "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert {path.name for path in tmp_path.iterdir()} == {stage.file for stage in STAGES[1:]} | {SUMMARY}
    text = (tmp_path / SUMMARY).read_text()
    tables, environment = text.split("\n\nEnvironment(", 1)
    assert finished.stdout.rstrip().endswith(tables)
    assert "passed" in tables
    assert "backends:" in environment
