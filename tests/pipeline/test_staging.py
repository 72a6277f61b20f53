"""Results are written all or nothing: what fails leaves the folder as it was."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import rows as rows_module
from fpe_pipeline import Inversion
from fpe_pipeline.atomic_folder import check_writable, replaced, staged, write_text
from fpe_pipeline.errors import InputError
from fpe_pipeline.inversion import trajectory
from fpe_pipeline.recordings.folder_store import FileStore
from fpe_pipeline.sampling.noise_schedule import NoiseSchedule

FULL = OSError(errno.ENOSPC, "no space")
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


def test_a_full_disk_is_named_by_the_folder(tmp_path):
    """What the system says of a write that fails names no file."""
    folder = tmp_path / "full"
    with pytest.raises(OSError, match=re.escape(f"no space: '{folder}'")), staged(folder):
        raise FULL
    with pytest.raises(OSError, match=re.escape(f"no space: '{folder / 'a.txt'}'")), replaced(folder / "a.txt"):
        raise FULL


def test_a_folder_in_the_place_of_a_file(folder):
    (folder / "c.png").mkdir()
    before = content(folder)
    with pytest.raises(InputError, match=r"cannot write c\.png into .*rename them, or pass another folder"):
        write(folder)
    assert content(folder) == before


def fail(monkeypatch, name, number, error):
    """Let the call of a number (from 0 on) of a function of ``os`` fail, and say how many were made."""
    real, calls = getattr(os, name), []

    def planted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number + 1:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, planted)
    return calls


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("name", "number"),
    [*(("replace", number) for number in range(4)), *(("fsync", number) for number in range(5)), ("open", 2)],
)
def test_an_error_on_the_way_puts_the_old_ones_back(folder, monkeypatch, error, name, number):
    """Four files, of which two exist: four renames, and what is brought to the disk are four files and the folder."""
    before = content(folder)
    fail(monkeypatch, name, number, error)
    with pytest.raises(type(error)):
        write(folder)
    monkeypatch.undo()
    assert content(folder) == before


@pytest.mark.parametrize("number", range(6))
def test_where_files_have_one_name_only(folder, monkeypatch, number):
    """Without hard links the old files make room by being renamed: six renames in all, each of which may fail."""
    before = content(folder)

    def link(*arguments, **options):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    calls = fail(monkeypatch, "replace", number, FULL)
    with pytest.raises(OSError, match="no space"):
        write(folder)
    assert content(folder) == before
    calls.clear()
    monkeypatch.undo()
    monkeypatch.setattr(os, "link", link)
    write(folder)
    assert content(folder) == {**dict.fromkeys(NAMES, "new"), "notes.txt": "old"}


def test_the_name_of_a_file_is_never_missing(folder, monkeypatch):
    seen, replace = [], os.replace

    def watched(source, destination):
        seen.append(content(folder).get("run.json"))
        replace(source, destination)
        seen.append(content(folder).get("run.json"))

    monkeypatch.setattr(os, "replace", watched)
    write(folder)
    assert seen == ["old"] * 7 + ["new"]


def test_files_are_on_the_disk_before_they_have_their_names_and_the_folder_after(folder, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("disk"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("name"), replace(*names)))
    write(folder)
    assert order == ["disk"] * 4 + ["name"] * 4 + ["disk"]


def test_a_folder_that_cannot_be_brought_to_the_disk_is_written_all_the_same(folder, monkeypatch):
    fail(monkeypatch, "fsync", 4, OSError(errno.EINVAL, "not of folders"))
    write(folder)
    assert content(folder)["a.png"] == "new"


def rows(path, text):
    rows_module.write(path, [rows_module.Row("kernels", "any", text, "float32", "cpu", "missing")])


def inversion(path, text):
    latents = torch.zeros(2, 1, 4, 2, 2)
    schedule = NoiseSchedule("DDIMScheduler", (1.0,), (0.5,), {})
    Inversion("ddim", latents, text, 1.0, schedule, Image.new("RGB", (8, 8))).save(path)


@pytest.mark.parametrize("writer", [write_text, rows, inversion])
@pytest.mark.parametrize(("name", "number"), [("fsync", 0), ("replace", 0), ("fsync", 1), (None, 0)])
def test_one_file_on_a_full_disk(tmp_path, monkeypatch, writer, name, number):
    """At the file's bytes, at its name, at the folder's; None is at the writing itself."""
    path = tmp_path / "kept.json"
    writer(path, "old")
    before = path.read_bytes()
    if name is None:
        monkeypatch.setattr(Path, "write_text", half_of_it)
        monkeypatch.setattr(trajectory, "save_tensors", lambda path, tensors, metadata: half_of_it(path, "new"))
    else:
        fail(monkeypatch, name, number, FULL)
    with pytest.raises(OSError, match="no space"):
        writer(path, "new")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before
    writer(path, "new")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() != before


def half_of_it(path, text, **options):
    Path(path).write_bytes(text.encode()[:1])
    raise FULL


def test_a_recording_on_a_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    """Its first file's bytes, name and folder; and its index, which makes a recording of it."""
    for name, number in (("fsync", 0), ("replace", 0), ("fsync", 1), ("fsync", 2), ("replace", 1), ("fsync", 3)):
        store = FileStore.create(tmp_path / "recording")
        fail(monkeypatch, name, number, FULL)
        with pytest.raises(OSError, match="no space"):
            store.write_latents({"latents": torch.zeros(4)})
            store.finish({}, {})
        monkeypatch.undo()
        store.discard()
        assert content(tmp_path) == {}


@pytest.mark.skipif(os.name == "nt", reason="has other rights")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_tensors_are_for_whom_other_files_are(tmp_path, mask):
    """A recording on a shared disk is read by a colleague, who could read its pictures and index alone."""
    before = os.umask(mask)
    try:
        FileStore.create(tmp_path).write_latents({"latents": torch.zeros(4)})
        inversion(tmp_path / "kept.safetensors", "a cat")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}


@pytest.mark.skipif(os.name == "nt", reason="has no limit of what a process writes")
def test_tensors_that_the_disk_does_not_take_are_an_error_of_the_disk(tmp_path):
    """The library that writes them has an error of its own, which names no file."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = FileStore.create(tmp_path / "recording")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OSError, match=re.escape(f"'{store.folder / 'latents.safetensors'}'")) as raised:
            store.write_latents({"latents": torch.zeros(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert content(store.folder) == {}


@pytest.mark.skipif(os.name == "nt", reason="says of such names that they are none")
@pytest.mark.parametrize("name", ["n" * 300, "new/" + "n" * 300, f"{'n' * 300}/new", "n/" * 4000])
def test_a_name_that_the_file_system_does_not_take_is_refused_before_anything_is_made(tmp_path, monkeypatch, name):
    with pytest.raises(InputError, match=r"cannot write into .*: File name too long; pass another folder with -o"):
        check_writable(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="File name too long"):
        check_writable(Path(name))
    check_writable(Path("new/../newer"))
    assert content(tmp_path) == {}


def test_two_processes_write_one_file_each_its_own(tmp_path):
    with replaced(tmp_path / "file") as first:
        assert str(os.getpid()) in first.name and first.parent == tmp_path
        first.write_text("first")
    assert content(tmp_path) == {"file": "first"}


def test_a_folder_that_was_not_there_is_taken_away_again(tmp_path):
    with pytest.raises(OSError, match="full"), staged(tmp_path / "a" / "b") as stage:
        (stage / "a.png").write_text("new")
        raise OSError("full")
    assert content(tmp_path) == {}
    write(tmp_path / "a" / "b")
    assert content(tmp_path / "a" / "b") == dict.fromkeys(NAMES, "new")
