"""What is left to `make test-all`: cases that exist, beside others of the same test that are not left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.long_cases import durations, listed, longest
from tests.support.long_cases import test_of as of_test

ROOT = Path(__file__).parents[1]


def test_seconds_are_those_of_a_case_and_what_is_set_up_for_it():
    printed = [
        "1.50s call     a.py::T::test[x y]",
        "0.50s setup    a.py::T::test[x y]",
        "2.0s call b.py::test",
        "= 3 passed =",
    ]
    assert durations(printed) == {"a.py::T::test[x y]": 2.0, "b.py::test": 2.0}


def test_a_sixth_of_the_cases_stays_and_short_ones_do():
    seconds = {f"t[{n}]": float(n) for n in range(1, 8)} | {"u[1]": 0.01, "u[2]": 0.05, "alone": 60.0}
    assert longest(seconds) == ["t[3]", "t[4]", "t[5]", "t[6]", "t[7]"]


@pytest.mark.slow
def test_each_exists_and_others_of_its_test_are_run_by_default():
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-m"]
    run = lambda marks: subprocess.run([*command, marks], cwd=ROOT, capture_output=True, text=True, check=False).stdout  # noqa: E731
    every, default = (set(run(marks).splitlines()) for marks in ("not gpu", "not slow and not gpu"))
    assert listed() <= every, f"no such cases: {sorted(listed() - every)[:5]}"
    assert not listed() & default
    stay = {of_test(case) for case in default}
    assert {of_test(case) for case in listed()} <= stay
