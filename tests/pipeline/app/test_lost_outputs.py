"""What a run says may find no reader, or no room: its pictures and its exit code are those of any other run."""

import io
import os
import subprocess
import sys

import pytest

from fpe_pipeline.runs.progress import Bars, Lines
from tests.support.silent import SOURCE, TARGET

pytestmark = pytest.mark.skipif(os.name == "nt", reason="closes pipes and opens devices as POSIX has them")
FULL = "/dev/full"
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason="has no device that is always full")
FAST = ["--steps", "1", "--size", "16x16", "--self-replace", "1", "--no-control"]


def fpe(*arguments, **streams):
    """The command with standard output that nobody reads, unless ``streams`` say otherwise."""
    reader, unread = os.pipe()
    os.close(reader)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        streams = {"stdout": unread, "stderr": subprocess.PIPE, **streams}
        return subprocess.run([sys.executable, "-m", "fpe_pipeline", *arguments], env=environment, **streams)
    finally:
        os.close(unread)


@pytest.mark.parametrize("arguments", [["edit", "--help"], pytest.param(["info"], marks=pytest.mark.slow)])
def test_a_reader_that_has_gone_is_no_failure(arguments):
    done = fpe(*arguments)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_error_keeps_its_exit_code_where_nobody_reads():
    done = fpe("edit", "--sorce", "a cat", "--json")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert fpe("edit", "--sorce", "a cat", stderr=subprocess.STDOUT).returncode == 2


@needs_full
def test_an_error_keeps_its_exit_code_on_a_full_disk():
    with open(FULL, "w") as full:
        assert fpe("edit", "--sorce", "a cat", stderr=full).returncode == 2


@needs_full
def test_a_full_standard_output_is_an_error():
    """Where a program reads paths, a part of them is none."""
    with open(FULL, "w") as full:
        done = fpe("edit", "--help", stdout=full)
    assert done.returncode == 1 and b"No space left" in done.stderr


@needs_full
@pytest.mark.slow
def test_progress_that_cannot_be_written_ends_no_run(tmp_path):
    with open(FULL, "w") as full:
        done = fpe("edit", "--source", SOURCE, "--target", TARGET, *FAST, "-o", str(tmp_path / "out"), stderr=full)
    assert done.returncode == 0
    assert (tmp_path / "out" / "run.json").is_file()


@pytest.mark.parametrize("kind", [Bars, Lines])
def test_progress_on_a_terminal_that_was_closed(monkeypatch, kind):
    master, slave = os.openpty()
    terminal = io.TextIOWrapper(io.FileIO(slave, "w"), write_through=True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    os.close(master)
    with pytest.raises(OSError, match="Input/output error"):
        terminal.write("read by nobody\n")
    with kind() as progress:
        for done in range(3):
            progress.tell("edit", done, 2)
    terminal.write("and still by nobody\n")  # which is how Python ends: this would cost the run its exit code
