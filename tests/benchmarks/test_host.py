"""The host's time with launches taken away: ratios of CPU time in rounds that both took part in, whatever else runs."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from benchmarks.host import PAIRS
from benchmarks.rows import ROOT, read


@cache
def ratios(folder: Path) -> dict[str, float]:
    # A process of its own: kernels that were imported for the interpreter cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])}
    program = [sys.executable, "-m", "benchmarks.host", "--rounds", "9", "--json", str(folder)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    samples = {(row.case.split("/")[0], row.provider): row.samples_ms for row in read(folder / "cpu-host.json")}
    medians = {key: statistics.median(values) for key, values in samples.items()}
    return {case: medians[case, ours] / medians[case, base] for case, (base, ours) in PAIRS.items()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, float]:
    return ratios(tmp_path_factory.mktemp("host"))


@pytest.mark.slow
def test_a_call_costs_little_more_than_an_operator_that_only_allocates(measured):
    """It takes 5.5 times as long by the dispatcher."""
    assert measured["call"] < 1.9


@pytest.mark.slow
def test_an_edited_layer_costs_no_more_than_the_unedited(measured):
    """It takes twice as long by the general way of evaluating products."""
    assert measured["layer"] < 1.15


@pytest.mark.slow
def test_an_edited_step_costs_no_more_than_the_unedited(measured):
    """The session's work at each step included; asking for every layer's products at each step makes it 1.25."""
    assert measured["step"] < 1.12
