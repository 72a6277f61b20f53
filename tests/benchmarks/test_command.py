"""`python -m benchmarks`: what a run writes, what an interrupted one leaves, how it goes on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import edits, measure
from benchmarks.cases import Case
from benchmarks.plan import Step
from benchmarks.recordings import RecordedEdit
from benchmarks.rows import Environment, read, write
from benchmarks.run import Bench
from benchmarks.unets import UNetCase

CASES = [Case("test", 64, tokens, 1, 8, 1, "pair") for tokens in (16, 24, 32)]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The command on three small cases; returns how to call it, and the file of rows."""
    monkeypatch.setitem(measure.CACHE_BYTES, "cpu", 2**16)
    monkeypatch.setattr(command, "kernel_plan", lambda device, quick: [Step(case) for case in CASES])
    monkeypatch.setattr(Bench, "roofline", lambda bench: [])
    arguments = ["kernels", "--quick", "--device", "cpu", "--json", str(tmp_path), "--seconds", "0.1"]
    return lambda *more: command.main([*arguments, *more]), tmp_path / "cpu-kernels.json"


def cases_in(path):
    return list(dict.fromkeys(row.case for row in read(path) if row.case != "any"))


@pytest.mark.slow
def test_rows_are_written_after_every_case_and_a_run_goes_on(small, monkeypatch):
    run, path = small
    measured = []
    whole = Bench.case

    def stops(bench, case, providers):
        measured.append(case.name)
        if case is CASES[1]:
            raise KeyboardInterrupt
        return whole(bench, case, providers)

    monkeypatch.setattr(Bench, "case", stops)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert cases_in(path) == [CASES[0].name]

    def counted(bench, case, providers):
        measured.append(case.name)
        return whole(bench, case, providers)

    monkeypatch.setattr(Bench, "case", counted)
    assert run("--resume") == 0
    assert cases_in(path) == [case.name for case in CASES]
    assert measured == [CASES[0].name, CASES[1].name, CASES[1].name, CASES[2].name]


@pytest.mark.slow
def test_rows_of_another_commit_are_measured_again_and_other_cases_stay(small):
    run, path = small
    assert run() == 0
    old = [dataclasses.replace(row, commit="0123456789ab") for row in read(path)]
    write(path, old)
    assert run("--resume", "--cases", "/24x") == 0
    rows = read(path)
    assert {row.commit for row in rows if row.case == CASES[1].name}.isdisjoint({"0123456789ab"})
    assert [row for row in rows if row.case in (CASES[0].name, CASES[2].name)] == [
        row for row in old if row.case in (CASES[0].name, CASES[2].name)
    ]


def test_going_on_needs_the_rows(capsys):
    with pytest.raises(SystemExit):
        command.main(["kernels", "--resume"])
    assert "--resume needs --json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_edit_is_judged_by_its_first_step(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setitem(measure.CACHE_BYTES, "cpu", 2**16)
    here = Environment("cpu: a processor (2 cores)", 1, {}, "0123456789ab", "2026-01-01")
    bench = Bench("cpu", torch.float32, measure.Effort(1, 1, 0.1, 1.0, 1), here)
    case = UNetCase("tiny", 64, selection="all", steps=2)
    right = {row.provider: row for row in edits.run_edit(bench, case, ["fpe"])}["fpe"]
    assert right.status == "ok" and 0.0 < right.error <= right.budget

    original = edits.Sampler.first_step

    def spoiled(sampler):
        return original(sampler) * (1.01 if sampler.case == case else 1.0)

    monkeypatch.setattr(edits.Sampler, "first_step", spoiled)
    assert edits.run_edit(bench, case, ["fpe"])[0].status == "wrong"


@pytest.mark.slow
def test_a_recorded_edit_is_measured_beside_the_whole_one(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    monkeypatch.setitem(measure.CACHE_BYTES, "cpu", 2**16)
    monkeypatch.setattr(measure, "QUICK", measure.Effort(1, 1, 0.1, 1.0, 1))
    monkeypatch.setattr(Bench, "roofline", lambda bench: [])
    monkeypatch.setattr(command, "recordings_plan", lambda quick: [RecordedEdit("fpe", 48, 2)])
    assert command.main(["recordings", "--quick", "--device", "cpu", "--json", str(tmp_path)]) == 0
    rows = {row.provider: row for row in read(tmp_path / "cpu-recordings.json")}
    assert set(rows) == {"full", "full-source-dropped", "recorded-device", "recorded-cpu", "recorded-folder"}
    assert all(row.status == "ok" and row.samples_ms for row in rows.values())
