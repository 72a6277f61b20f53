"""Steps under torch.compile: processes that compile at once, and take their samples in turns."""

from __future__ import annotations

from multiprocessing import Pipe
from threading import Thread

import pytest
import torch

from benchmarks import compiled
from benchmarks.compiled import Made, run_compiled
from benchmarks.measure import Effort
from benchmarks.run import Bench
from benchmarks.unets import UNetCase

TINY = UNetCase("tiny", 64)


@pytest.mark.slow
def test_every_editor_of_every_case_is_compiled_and_held_against_higher_precision() -> None:
    bench = Bench("cpu", torch.float32, Effort(rounds=4, least_rounds=3, seconds=2.0, sample_ms=1.0))
    cases = [TINY, UNetCase("tiny", 96)]
    found = list(run_compiled(bench, cases, options={"backend": "eager"}))
    assert [[row.provider for row in rows] for rows in found] == [["unedited-compiled", "fpe-compiled"]] * 2
    assert [{row.case for row in rows} for rows in found] == [{case.name} for case in cases]
    for unedited, edited in found:
        assert unedited.status == edited.status == "ok", (unedited.reason, edited.reason)
        assert len(unedited.samples_ms) == len(edited.samples_ms) >= 3


def served(answers: dict[str, Made], taken: list[str], case: UNetCase = TINY) -> dict:
    """Processes that have compiled, stood in for by threads: each says what it made, and then which sample it takes."""
    pipes = {}
    for name, made in answers.items():
        pipes[case, name], theirs = Pipe()

        def serve(name=name, made=made, theirs=theirs) -> None:
            theirs.send(made)
            while True:
                try:
                    theirs.recv()
                except EOFError:
                    return
                taken.append(name)
                theirs.send(float(len(taken)))

        Thread(target=serve, daemon=True).start()
    return pipes


@pytest.fixture
def rows_of(monkeypatch: pytest.MonkeyPatch):
    def run(answers: dict[str, Made], rounds: int = 3, left: float = 10.0) -> tuple[list, list[str]]:
        from contextlib import nullcontext

        taken: list[str] = []
        ended: list[tuple[UNetCase, str]] = []
        monkeypatch.setattr(compiled, "_compiling", lambda *_: nullcontext((served(answers, taken), ended.append)))
        bench = Bench("cpu", torch.float32, Effort(rounds=rounds, least_rounds=rounds))
        (rows,) = run_compiled(bench, [TINY], list(answers), time_left=lambda: left)
        assert ended == [(TINY, name) for name, made in answers.items() if made.problem]
        return rows, taken

    return run


def test_samples_are_taken_in_rounds_that_begin_with_the_next_one(rows_of) -> None:
    rows, taken = rows_of({"unedited": Made(), "fpe": Made()})
    assert taken == ["unedited", "fpe", "fpe", "unedited", "unedited", "fpe"]
    assert {row.provider: row.samples_ms for row in rows} == {
        "unedited-compiled": (1.0, 4.0, 5.0),
        "fpe-compiled": (2.0, 3.0, 6.0),
    }


def test_what_does_not_compile_or_is_wrong_is_said_and_not_timed(rows_of) -> None:
    rows, taken = rows_of({"unedited": Made(), "fpe": Made(problem="RuntimeError: no graph")})
    assert {(row.provider, row.status, row.reason) for row in rows} == {
        ("unedited-compiled", "ok", ""),
        ("fpe-compiled", "failed", "RuntimeError: no graph"),
    }
    rows, taken = rows_of({"fpe": Made(error=2e-3, budget=1e-3)})
    assert taken == [] and rows[0].status == "wrong"
    assert rows[0].reason == "relative error 2.00e-03 exceeds its budget of 1.00e-03"


def test_a_process_that_is_late_or_gone_is_a_failed_row(monkeypatch) -> None:
    ours, theirs = Pipe()
    assert compiled._answer(ours, lambda: 0.0).problem == "it was not compiled in time"
    theirs.close()
    assert compiled._answer(ours, lambda: 1.0).problem == "the process that compiled it has ended"


@pytest.mark.parametrize("says", [Made("OutOfMemoryError: no room"), None], ids=["raises", "dies"])
def test_one_that_cannot_go_on_is_a_failed_row_and_the_other_is_timed(monkeypatch, rows_of, says) -> None:
    def sample(pipe, before=compiled._sample):
        answer = before(pipe)
        if answer != 4.0:  # of the second round
            return answer
        return says or before(ended)

    ended, theirs = Pipe()
    theirs.close()
    monkeypatch.setattr(compiled, "_sample", sample)
    rows, _ = rows_of({"unedited": Made(), "fpe": Made()})
    by_name = {row.provider: row for row in rows}
    assert by_name["unedited-compiled"].status == "failed" and not by_name["unedited-compiled"].samples_ms
    assert by_name["unedited-compiled"].reason == (says.problem if says else "the process that compiled it has ended")
    assert len(by_name["fpe-compiled"].samples_ms) == 3


def test_rounds_fit_their_time() -> None:
    made = {(TINY, "unedited"): Made(sample_ms=100.0), (TINY, "fpe"): Made(sample_ms=150.0)}
    effort = Effort(rounds=50, least_rounds=3, seconds=5.0)
    assert compiled._rounds(effort, made, TINY, ["unedited", "fpe"]) == 20
    assert compiled._rounds(Effort(rounds=7, seconds=5.0), made, TINY, ["unedited"]) == 7
    assert compiled._rounds(Effort(rounds=50, least_rounds=3, seconds=0.1), made, TINY, ["fpe"]) == 3
