"""A GPU session on a machine without one: its arithmetic, a dry run, and faults planted into it."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.candidates import ALL, BOUNDED, DESCRIBED, SPECIALISED, choices, tuning_plan
from benchmarks.cost import Ceilings
from benchmarks.gpu import measuring, records, stages
from benchmarks.gpu.context import Context
from benchmarks.gpu.measuring import bench_of
from benchmarks.gpu.records import Journal, heard, read_journal, rows_of
from benchmarks.gpu.session import (
    BUDGETS,
    GRACE,
    Session,
    collect,
    collect_journals,
    reason_to_skip,
    schedule,
    summarise,
)
from benchmarks.gpu.stages import FULL, SESSIONS, SMOKE, Stage
from benchmarks.rows import ROOT, Row, read
from benchmarks.unets import UNetCase
from benchmarks.workers.pool import Task, share_out
from tests.support import planted_faults

HERE = planted_faults.HERE


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run_with(chosen, budget, takes):
    clock, given = Clock(), {}

    def run(stage, seconds):
        given[stage.name] = seconds
        clock.now += takes(stage, seconds)

    schedule(chosen, run, budget, clock)
    return given, clock.now


@pytest.mark.parametrize("kind", SESSIONS)
def test_stages_that_use_all_their_time_stay_within_the_budget(kind):
    _, end = run_with(SESSIONS[kind], BUDGETS[kind], lambda stage, seconds: seconds)
    assert end == pytest.approx(BUDGETS[kind])
    assert sum(stage.share for stage in SESSIONS[kind]) == pytest.approx(1.0)


def test_the_three_sessions_fit_a_quarter_of_an_hour_even_where_every_stage_is_killed():
    ends = [run_with(SESSIONS[kind], BUDGETS[kind], lambda stage, seconds: seconds + GRACE)[1] for kind in SESSIONS]
    assert sum(BUDGETS.values()) <= 900
    assert all(end <= BUDGETS[kind] + GRACE for kind, end in zip(SESSIONS, ends, strict=True))


def test_unused_time_moves_on():
    chosen = [Stage(name, share, "") for name, share in (("a", 0.5), ("b", 0.25), ("c", 0.25))]
    given, _ = run_with(chosen, 100.0, lambda stage, seconds: 0.0)
    assert given == {"a": 50.0, "b": 50.0, "c": 100.0}


def test_a_stage_for_which_no_time_is_left_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.session.warm_up", lambda: None)
    session = Session("smoke", tmp_path, 0.0, "cpu", dry=True)
    assert session.run() == 1
    assert set(session.outcomes) == {stage.name for stage in SMOKE}
    assert [record["why"] for record in session.findings.failures] == ["no time was left for it"] * len(SMOKE)


def test_candidates_fit_a_multiprocessor():
    for case in tuning_plan():
        if case.layout == "guided":
            continue
        chosen = choices(case, "sm_100")
        assert 4 <= len(chosen) <= len(ALL) + len(BOUNDED) + len(DESCRIBED) + len(SPECIALISED)
        assert set(choices(case, "sm_120")) <= set(chosen)


def tasks(*entries):
    return [Task(name, f"tests.support.planted_faults:{name.split()[0]}", arguments) for name, *arguments in entries]


@pytest.mark.slow
def test_a_task_that_hangs_dies_or_raises_is_named_and_the_others_are_done():
    given = tasks(("answer 1", 1), ("abort",), ("nap for ever", 1000), ("refuse",), ("answer 2", 2), ("answer 3", 3))
    outcomes = {outcome.task.name: outcome for outcome in share_out(warm() + given, 1, limit=3.0, startup=8.0)}
    assert [outcomes[f"answer {n}"].value for n in (1, 2, 3)] == [1, 2, 3]
    assert outcomes["abort"].problem == "died: killed by SIGABRT"
    assert outcomes["nap for ever"].problem.startswith("hung: no answer within")
    assert outcomes["refuse"].problem.startswith("ValueError: no such thing (")
    assert not any(outcome.skipped for outcome in outcomes.values())


def warm():
    return tasks(("answer 0", 0))


@pytest.fixture(autouse=True)
def _planted(monkeypatch):
    """Stages and workers find the planted faults."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_without_time_left_tasks_are_skipped_by_name():
    outcomes = list(share_out(tasks(("answer 1", 1), ("answer 2", 2)), 1, 3.0, time_left=lambda: 0.0))
    assert [(outcome.task.name, outcome.skipped) for outcome in outcomes] == [("answer 1", True), ("answer 2", True)]


def test_what_a_stage_says_is_heard_and_other_output_is_not(capsys):
    records.say("check", what="a name", ok=True)
    line = capsys.readouterr().out
    assert heard(line) == {"kind": "check", "what": "a name", "ok": True}
    assert heard("kind: check") is None
    assert heard(records.MARK + "{cut") is None


def test_a_full_disk_keeps_findings_until_it_takes_them_again(tmp_path):
    path = tmp_path / "records.jsonl"
    path.symlink_to("/dev/full")
    journal = Journal(path)
    journal.keep({"kind": "note", "text": "first"})
    journal.keep({"kind": "note", "text": "second"})
    assert "No space left on device" in journal.problem
    path.unlink()
    journal.keep({"kind": "note", "text": "third"})
    assert [record["text"] for record in read_journal(path)] == ["first", "second", "third"]
    assert not journal.problem
    assert not journal.waiting


def test_what_the_disk_never_took_is_brought_elsewhere(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    path.symlink_to("/dev/full")
    journal = Journal(path)
    journal.keep({"kind": "note", "text": "only"})
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    saved = journal.rescue(sys.stdout)
    assert [record["text"] for record in read_journal(saved)] == ["only"]


def test_a_line_that_was_cut_costs_that_line_alone(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"kind": "note", "text": "whole"}\n{"kind": "note", "te\n{"kind": "note", "text": "next"}\n')
    assert [record["text"] for record in read_journal(path)] == ["whole", "next"]


def test_rows_are_collected_into_a_file_a_suite_and_a_case_goes_as_a_whole(tmp_path):
    def row(case, provider, sample):
        return Row.new(
            HERE,
            suite="kernels",
            case=case,
            provider=provider,
            dtype="float16",
            status="ok",
            samples_ms=(sample,),
        )

    collect(tmp_path, [row("a", "fpe-triton", 1.0), row("a", "sdpa", 2.0), row("b", "sdpa", 3.0)])
    (path,) = collect(tmp_path, [row("a", "fpe-triton", 1.5)])
    kept = [(one["case"], one["provider"], one["samples_ms"]) for one in json.loads(path.read_text())["rows"]]
    assert kept == [("b", "sdpa", [3.0]), ("a", "fpe-triton", [1.5])]


def journal_of(path, at, **samples):
    """A session's journal of one edited step, with the samples of its editors."""
    about = {"suite": "edits", "case": "sd15-512/guided-1/default/1", "dtype": "float16", "status": "ok"}
    rows = [
        Row.new(HERE, **about, provider=name.replace("_", "-"), samples_ms=taken) for name, taken in samples.items()
    ]
    said = [{"kind": "row", "row": records._plain(row)} for row in rows]
    said.append({"kind": "stage", "stage": "edits", "outcome": "done", "at": at})
    path.write_text("".join(json.dumps(record) + "\n" for record in said))


@pytest.mark.parametrize(("smoke", "full", "stands"), [(1.0, 2.0, "full"), (2.0, 1.0, "smoke"), (0.0, 0.0, "full")])
def test_a_case_of_two_journals_is_that_of_the_later_session(tmp_path, smoke, full, stands):
    journal_of(tmp_path / "smoke.jsonl", smoke, unedited=(50.0, 51.0), fpe=(40.0, 41.0))
    journal_of(tmp_path / "full.jsonl", full, unedited=(10.0,), fpe=(9.0,), dense_original=(30.0,))
    (path,) = collect_journals(tmp_path)
    kept = {row.provider: row.samples_ms for row in read(path)}
    of_smoke = {"unedited": (50.0, 51.0), "fpe": (40.0, 41.0)}
    assert kept == (of_smoke if stands == "smoke" else {"unedited": (10.0,), "fpe": (9.0,), "dense-original": (30.0,)})


def test_another_session_keeps_the_journal_of_the_one_before(tmp_path):
    for number in (1.0, 2.0, 3.0):
        Session("full", tmp_path, 60.0, "cpu", dry=True)
        journal_of(tmp_path / "full.jsonl", number, unedited=(number,))
    firsts = {path.name: next(iter(rows_of(read_journal(path)))).samples_ms for path in tmp_path.iterdir()}
    assert firsts == {"full-1.jsonl": (1.0,), "full-2.jsonl": (2.0,), "full.jsonl": (3.0,)}


@pytest.mark.slow
def test_ceilings_are_those_of_the_device_and_the_dtype(tmp_path):
    context = Context(tmp_path, "cpu", 0.0, dry=True)
    rows = bench_of(context).roofline()
    others = [dataclasses.replace(row, device="cuda: another", samples_ms=(1e-9,)) for row in rows]
    for name, written in (("full-1", rows), ("full", others)):
        said = ({"kind": "row", "row": records._plain(row)} for row in written)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in said))
    ceilings = bench_of(context).ceilings
    assert ceilings.flops == pytest.approx(Ceilings.of_rows(rows).flops, rel=1e-3)


def test_rounds_of_a_step_fit_what_is_left_of_a_stage(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        "benchmarks.edits.run_edit", lambda bench, case, names: given.append(bench.effort.seconds) or []
    )
    for left in (90.0, 12.0, 7.0):
        context = Context(tmp_path, "cpu", time.time() + left)
        measuring._edits(context, [UNetCase("tiny", 64)], ("unedited",), rounds=40, seconds=20.0)
    assert given == [20.0, pytest.approx(4.0, abs=0.5)]


def test_compiling_leaves_the_time_that_the_rounds_take(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("benchmarks.compiled.run_compiled", lambda *_, time_left, **__: given.append(time_left()) or [])
    measuring.compiled(Context(tmp_path, "cpu", time.time() + 60.0))
    assert given == [pytest.approx(60.0 - 3 * 6.0, abs=2.0)]


def test_a_summary_names_every_failure():
    said = [{"kind": "failure", "what": "forward, 40", "why": "error 1 passes the budget of 0.1"}]
    text = summarise(said, {"checks": "FAILED (SIGTERM) after 3 s"})
    assert "Failures: 1\n  forward, 40: error 1 passes the budget of 0.1" in text
    assert "checks: FAILED (SIGTERM)" in text


def test_a_chip_below_8_skips_the_kernels_stages_and_measures_the_others(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *args: (7, 5))
    skipped = {stage.name: reason_to_skip(stage, "cuda") for stage in FULL if not stage.needs}
    assert "compute capability (7, 5)" in skipped["checks"]
    assert not skipped["kernels"]
    assert "as blocks of matrix products" in stages._too_old((7, 5), "it needs compute capability 8.0 or newer")


def test_without_cuda_the_command_says_what_serves():
    finished = command("smoke")
    assert finished.returncode == 2
    assert "No CUDA device" in finished.stderr
    assert "torch and reference serve" in finished.stderr


def command(*arguments, **more):
    line = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ, check=False, **more)


@pytest.fixture
def only_checks(monkeypatch):
    """A smoke session of its programs and checks alone."""
    chosen = tuple(stage for stage in SMOKE if stage.name in ("programs", "checks"))
    monkeypatch.setitem(SESSIONS, "smoke", chosen)


@pytest.mark.slow
def test_planted_faults_are_named_and_every_finished_check_is_kept(tmp_path, only_checks, capfd):
    faults = {"a wrong result": "wrong_result", "an abort": "abort", "a hang": "hang_on_the_device"}
    plant = ",".join(f"{name}=tests.support.planted_faults:{function}" for name, function in faults.items())
    faults["compiling a compiler that hangs"] = "hang_on_the_device"
    programs = "a compiler that hangs=tests.support.planted_faults:hang_on_the_device"
    session = Session(
        "smoke",
        tmp_path,
        300.0,
        "cpu",
        dry=True,
        options={"plant": plant, "plant-programs": programs, "check-limit": "6", "startup": "10"},
    )
    assert session.run() == 1
    said = list(read_journal(tmp_path / "smoke.jsonl"))
    failures = {record["what"]: record["why"] for record in said if record["kind"] == "failure"}
    assert set(failures) == set(faults)
    assert "passes the budget" in failures["a wrong result"]
    assert failures["an abort"] == "died: killed by SIGABRT"
    assert failures["a hang"].startswith("hung")
    assert failures["compiling a compiler that hangs"].startswith("hung")
    passed = [record["what"] for record in said if record["kind"] == "check" and record["ok"]]
    assert len(passed) >= 4
    summary = (tmp_path / "summary.txt").read_text()
    assert all(f"  {name}: " in summary for name in faults)


@pytest.mark.parametrize(
    ("stage", "seconds", "words"),
    [
        pytest.param("terminated", 60.0, "ended by SIGTERM while at: the next case", marks=pytest.mark.slow),
        pytest.param("hung", 8.0, "past its time while at: the next case", marks=pytest.mark.slow),
        pytest.param("out_of_memory", 60.0, "CUDA out of memory", marks=pytest.mark.slow),
    ],
)
def test_a_stage_that_ends_badly_leaves_its_rows_and_the_rest_goes_on(tmp_path, monkeypatch, stage, seconds, words):
    after = Stage("environment", 0.5, "benchmarks.gpu.stages:environment")
    monkeypatch.setitem(SESSIONS, "smoke", (Stage(stage, 0.5, f"tests.support.planted_faults:{stage}"), after))
    monkeypatch.setattr("benchmarks.gpu.session.GRACE", 0.5)
    assert Session("smoke", tmp_path, 2 * seconds, "cpu", dry=True).run() == 1
    said = list(read_journal(tmp_path / "smoke.jsonl"))
    assert next(iter(rows_of(said))).case == "a"
    assert any(words in record["why"] for record in said if record["kind"] == "failure")
    assert [record for record in said if record["kind"] == "stage"][-1]["outcome"].startswith("done")
    assert json.loads((tmp_path / "cuda-kernels.json").read_text())["rows"][0]["samples_ms"] == [1.0]


@pytest.mark.slow
def test_rows_after_the_tuners_table_was_taken_over_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(SESSIONS, "smoke", (Stage("environment", 1.0, "benchmarks.gpu.stages:environment"),))
    monkeypatch.delenv("FPE_COMMIT", raising=False)
    session = Session("smoke", tmp_path, 60.0, "cpu", dry=True)
    monkeypatch.setattr("benchmarks.tuned_table.take_over", lambda rows: "an entry")
    session._take_over()
    assert session.run() == 0
    notes = [record["text"] for record in read_journal(tmp_path / "smoke.jsonl") if record["kind"] == "note"]
    assert any("an entry" in note for note in notes)
    assert any(note.startswith("Environment(") and "+tuned'" in note for note in notes)


def test_a_stage_that_never_stops_talking_is_over_at_its_time(tmp_path, capsys):
    hears, says = os.pipe()
    stopped = threading.Event()

    def talk():
        for _ in range(1500):
            if stopped.wait(0.02):
                return
            os.write(says, b"a line of a test\n")

    talking = threading.Thread(target=talk)
    talking.start()
    try:
        begun = time.monotonic()
        session = Session("smoke", tmp_path, 60.0, "cpu", dry=True)
        assert session._listen(hears, SimpleNamespace(exitcode=None), begun + 0.5)
        assert time.monotonic() - begun < 20
    finally:
        stopped.set()
        talking.join()
        os.close(says)
    session._listen(hears, SimpleNamespace(exitcode=-9, join=lambda seconds: None), time.monotonic() + 5)
    assert set(capsys.readouterr().out.splitlines()) == {"a line of a test"}
    os.close(hears)


@pytest.mark.slow
def test_a_full_disk_is_a_failure_and_costs_no_finding(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(SESSIONS, "smoke", (Stage("environment", 1.0, "benchmarks.gpu.stages:environment"),))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    full = tmp_path / "full.jsonl"
    full.symlink_to("/dev/full")
    session = Session("smoke", tmp_path, 60.0, "cpu", dry=True, options={"journal": str(full)})
    assert session.run() == 1
    out = capfd.readouterr().out
    assert "writing results: " in out
    saved = out.rsplit("What could not be written lies in ", 1)[1].strip()
    assert [record["kind"] for record in read_journal(Path(saved))].count("note") >= 2


@pytest.mark.slow
def test_a_dry_run_of_the_full_session_leaves_every_file(tmp_path):
    finished = command("full", "--dry-run", "--out", str(tmp_path))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert {"summary.txt", "full.jsonl", "cpu-kernels.json", "cpu-edits.json", "cpu-memory.json"} <= names
    assert len(names) <= 8
    assert "Failures: none" in finished.stdout


@pytest.mark.slow
def test_a_dry_run_of_training_leaves_parts_of_a_bounded_size(tmp_path):
    finished = command("train", "--dry-run", "--out", str(tmp_path), "--max-mib", "0.5", "--budget", "300")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    parts = [path for path in tmp_path.iterdir() if path.name.startswith("embedded-model.tar.gz")]
    assert parts
    assert all(path.stat().st_size <= 2**19 for path in parts)
