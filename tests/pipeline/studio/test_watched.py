"""Work that is watched: what it tells, its end on request, its errors."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fpe_pipeline.studio.watched import Cancelled, Told, Watched, watch


def steps(count, reached=None):
    def work(watched):
        for done in range(count + 1):
            watched.tell("edit", done, count)
            if reached is not None:
                reached(done)
        return "made"

    return work


def test_the_latest_is_told_and_the_outcome_is_last():
    *told, made = watch(steps(5), Watched())
    assert made == "made" and all(isinstance(each, Told) for each in told)
    assert [each.done for each in told] == sorted(each.done for each in told)


def test_a_cancelled_run_ends_at_its_next_step():
    watched, seen = Watched(), []

    def reached(done):
        seen.append(done)
        if done == 2:
            watched.cancel()

    with pytest.raises(Cancelled):
        list(watch(steps(50, reached), watched))
    assert seen == [0, 1, 2]


def test_nobody_reads_on():
    """A page that is closed ends its run, and nothing of it is left behind."""
    begun, seen = threading.Event(), []

    def reached(done):
        seen.append(done)
        begun.set()
        threading.Event().wait(0.02)

    told = watch(steps(10_000, reached), Watched())
    assert begun.wait(0) or isinstance(next(told), Told)
    told.close()
    assert len(seen) < 1000 and not [each for each in threading.enumerate() if each.name == "fpe-run"]


def test_errors_of_the_work_are_raised():
    def work(watched):
        raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError, match="planted"):
        list(watch(work, Watched()))


def test_time_left():
    watched = Watched()
    for done in range(3):
        watched.tell("edit", done, 4)
    told = [watched.told.get() for _ in range(3)]
    assert told[1].left is None and told[2].left is not None
    assert str(told[2]).startswith("edit: step 2 of 4, ")


@pytest.mark.slow
def test_a_process_that_ends_ends_its_runs_first():
    """Python would stop their threads inside of torch, which aborts the process."""
    script = """
import time, torch
from fpe_pipeline.studio.watched import Watched

def work(watched):
    for step in range(10**6):
        torch.randn(400, 400) @ torch.randn(400, 400)
        watched.tell("step", step, 10**6)

watched = Watched()
watched.begin(work)
while watched.told.empty():
    time.sleep(0.01)
"""
    command, environment = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
