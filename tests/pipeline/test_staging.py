"""Results are written all or nothing: what fails leaves the folder as it was."""

import os

import pytest

from fpe_pipeline.atomic_folder import staged
from fpe_pipeline.errors import InputError

NAMES = ("a.png", "b.png", "c.png", "run.json")


def write(directory, names=NAMES):
    with staged(directory) as stage:
        for name in names:
            (stage / name).write_text("new")


def content(directory):
    return {path.name: path.read_text() if path.is_file() else "folder" for path in directory.iterdir()}


@pytest.fixture
def folder(tmp_path):
    """With an earlier result, and something that is none of ours."""
    for name in ("b.png", "run.json", "notes.txt"):
        (tmp_path / name).write_text("old")
    return tmp_path


def test_files_are_replaced_and_others_left_alone(folder):
    write(folder)
    assert content(folder) == {**dict.fromkeys(NAMES, "new"), "notes.txt": "old"}


def test_a_folder_in_the_place_of_a_file(folder):
    (folder / "c.png").mkdir()
    before = content(folder)
    with pytest.raises(InputError, match=r"cannot write c\.png into .*rename them, or pass another folder"):
        write(folder)
    assert content(folder) == before


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", range(6))
def test_an_error_between_two_files_puts_the_old_ones_back(folder, monkeypatch, error, after):
    """Two of the four files exist: six renames in all, each of which may be the last."""
    before, replace, calls = content(folder), os.replace, []

    def fail(source, destination):
        calls.append(source)
        if len(calls) == after + 1:
            raise error
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        write(folder)
    assert content(folder) == before


def test_a_folder_that_was_not_there_is_taken_away_again(tmp_path):
    with pytest.raises(OSError, match="full"), staged(tmp_path / "a" / "b") as stage:
        (stage / "a.png").write_text("new")
        raise OSError("full")
    assert content(tmp_path) == {}
    write(tmp_path / "a" / "b")
    assert content(tmp_path / "a" / "b") == dict.fromkeys(NAMES, "new")
