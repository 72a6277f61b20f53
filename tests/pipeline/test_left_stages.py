"""What a process that was killed was writing goes with the next run into the same folder; what a living one writes
stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fpe_pipeline import staging
from fpe_pipeline.atomic_folder import clear_left, replaced, staged
from fpe_pipeline.staging import clear_stages, new_stage

pytestmark = pytest.mark.skipif(os.name == "nt", reason="locks no folders")
# Writes half of its files, says so, and waits to be killed.
HALF = """
import sys, time
from pathlib import Path
from fpe_pipeline.atomic_folder import clear_left, replaced, staged
with staged(Path(sys.argv[1])) as stage:
    (stage / "a.png").write_text("half")
    print(stage, flush=True)
    time.sleep(600)
"""


def write(folder):
    with staged(folder) as stage:
        (stage / "b.png").write_text("new")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(staging.__file__).parents[1])}
    command = [sys.executable, "-c", HALF, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            stage = Path(process.stdout.readline().strip())
            assert stage.parent == tmp_path
            write(tmp_path)
            assert names(tmp_path) == [stage.name, "b.png"]
        finally:
            process.send_signal(signal.SIGKILL)
    assert names(tmp_path) == [stage.name, "b.png"]
    write(tmp_path)
    assert names(tmp_path) == ["b.png"]


def left(folder):
    """A stage whose process was killed."""
    stage, lock = new_stage(folder)
    os.close(lock)
    return stage


def test_a_file_that_had_made_room_gets_its_name_back(tmp_path):
    """Where files have one name only, the old one is in the stage alone until the new one is in its place."""
    stage = left(tmp_path)
    (stage / "a.png.before").write_text("old")
    (stage / "b.png.before").write_text("old")
    (tmp_path / "b.png").write_text("new")
    clear_stages(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.png": "old", "b.png": "new"}


def test_stages_of_other_machines_and_folders_of_other_names_stay(tmp_path, monkeypatch):
    left(tmp_path)
    (tmp_path / ".fpe-notes").mkdir()
    monkeypatch.setattr(staging.platform, "node", lambda: "another")
    before = names(tmp_path)
    clear_stages(tmp_path)
    assert names(tmp_path) == before


@pytest.mark.parametrize("missing", ["fcntl", "locks"])
def test_where_folders_cannot_be_locked_none_is_taken_for_left(tmp_path, monkeypatch, missing):
    stage = left(tmp_path)
    if missing == "fcntl":
        monkeypatch.setattr(staging, "fcntl", None)
    else:
        monkeypatch.setattr(staging.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(9, "Bad file descriptor")))
    write(tmp_path)
    assert names(tmp_path) == [stage.name, "b.png"]


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked"])
def test_a_stage_that_another_process_takes_for_left_is_made_anew(tmp_path, monkeypatch, when):
    """Between its making and its lock."""
    module, name = (staging.os, "open") if when == "before it is opened" else (staging.fcntl, "flock")
    real, taken = getattr(module, name), []

    def late(*arguments):
        if not taken:
            taken.append(None)
            monkeypatch.setattr(module, name, real)
            clear_stages(tmp_path)
            assert names(tmp_path) == []
        return real(*arguments)

    monkeypatch.setattr(module, name, late)
    stage, lock = new_stage(tmp_path)
    os.close(lock)
    assert taken and names(tmp_path) == [stage.name]


def test_a_file_that_is_written_again_clears_what_was_left_of_it(tmp_path):
    """Of processes of this machine that are no more; what others write, and files that are nobody's here, stay."""
    path = tmp_path / "photo.safetensors"
    with replaced(path) as partial:
        partial.touch()
        mine = partial.name
    dead = mine.replace(f"-{os.getpid()}.", f"-{2**31 - 1}.")
    living = mine.replace(f"-{os.getpid()}.", f"-{os.getppid()}.")
    elsewhere = dead.replace(dead.split(".")[-2][:8], "0" * 8)
    of_others = {".film.mkv.part", ".film.12.part", living, elsewhere, dead.replace("photo", "other")}
    for name in {dead, *of_others}:
        (tmp_path / name).touch()
    with replaced(path) as partial:
        partial.write_text("whole")
    assert {file.name for file in tmp_path.iterdir()} == {path.name, *of_others}
    assert path.read_text() == "whole"
    clear_left(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, *of_others} - {dead.replace("photo", "other")}
