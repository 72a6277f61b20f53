"""The training stage of a GPU session, and its end."""

import os
import signal
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals"),
    pytest.mark.usefixtures("answered_signals"),
]
TRAINING = """
import signal, sys, time
from pathlib import Path

def end(*_):
    time.sleep(0.5)
    Path(sys.argv[1]).touch()
    sys.exit()

signal.signal(signal.SIGTERM, end)
print("under way", flush=True)
time.sleep(600)
"""


def test_a_training_that_is_ended_with_its_stage_keeps_its_last_step_first(tmp_path):
    """Processes of a stage are sent SIGTERM together, and SIGKILL as soon as the stage itself has ended."""
    kept = tmp_path / "checkpoint"
    code = "import sys; from benchmarks.gpu.training import _train; _train([sys.executable, *sys.argv[1:]], 600)"
    stage = [sys.executable, "-c", code, "-c", TRAINING, str(kept)]
    with subprocess.Popen(stage, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        assert process.stdout.readline() == b"under way\n"
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        assert kept.exists()
    assert process.returncode != 0
