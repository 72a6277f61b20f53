"""Forty jobs, killed again and again: every picture once in the end, as if nobody had."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fpe_pipeline.embedded.scenes.scenes import COLOURS, OBJECTS
from tests.pipeline.batches.conftest import batch, manifest, pictures, written

ROOT = Path(__file__).parents[3]
JOBS, KILLS = 40, 5
SETTINGS = {"steps": 2, "size": (64, 64), "threads": 1, "device": "cpu"}


@pytest.fixture
def jobs(tmp_path):
    objects = list(OBJECTS)[:5]
    rows = [
        {"source": f"a photo of a red {thing}", "target": f"a photo of a {list(COLOURS)[n]} {thing}"}
        for n in range(JOBS // len(objects) // 2)
        for thing in objects
    ]
    rows += [{**row, "method": "masactrl", "options": {"start_step": 1}} for row in rows]
    assert len(rows) == JOBS
    return written(tmp_path / "jobs.jsonl", rows)


@pytest.mark.slow
def test_killed_at_random_moments(jobs, tmp_path):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    assert batch(jobs, undisturbed, defaults=SETTINGS).failed == {}
    arguments = ["--steps", "2", "--size", "64x64", "--threads", "1", "--device", "cpu", "--quiet"]
    command = [sys.executable, "-m", "fpe_pipeline", "batch", str(jobs), "-o", str(out), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    print("moments of seed", seed)
    kills = 0
    for _ in range(KILLS):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        there = len(pictures(out))
        wanted = there + moments.randrange(1, 6)
        while process.poll() is None and len(list(out.glob("*/*.png"))) < wanted:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.1)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert kills == KILLS, "it was done before it was killed"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert pictures(out) == pictures(undisturbed)
    assert [line["file"] for line in manifest(out)] == [line["file"] for line in manifest(undisturbed)]
    assert len({line["job"] for line in manifest(out) if "job" in line}) == JOBS
    assert not list(out.glob("**/*.part")) and not list(out.glob(".fpe-*"))
