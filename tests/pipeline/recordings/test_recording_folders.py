"""Folders of recordings: whatever is not exactly what was written is refused, and a failure leaves nothing behind."""

import copy
import json
import os
import pickle
import random
import shutil

import pytest
import torch

from fpe_pipeline import Recording, ddim_scheduler
from fpe_pipeline.errors import InputError
from fpe_pipeline.recordings.folder_store import FileStore
from tests.support.free_prompt_pipelines import SOURCE, TARGET, free_prompt_pipeline, noise

STEPS = 3
RUN = {"num_inference_steps": STEPS, "latents": noise()}
STEP = "step-0001.safetensors"


@pytest.fixture(scope="module")
def tiny(pipe):
    tiny = free_prompt_pipeline(pipe)
    tiny.scheduler = ddim_scheduler(tiny.scheduler)
    return tiny


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("recordings") / "source"
    tiny.record(SOURCE, placement=path, **RUN)
    return path


@pytest.fixture
def folder(original, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(original, copied)
    Recording.load(copied)
    return copied


def edited(tiny, recorded):
    return tiny.edit(recorded, TARGET, output_type="latent").images


class TestFailures:
    def test_an_interrupted_one_leaves_nothing(self, tiny, tmp_path, monkeypatch):
        calls = []

        def interrupt(self, step, tensors, write=FileStore.write):
            calls.append(step)
            write(self, step, tensors)
            if step == 1:
                assert (tmp_path / "new" / "r" / STEP).exists()
                raise KeyboardInterrupt

        before = tiny.unet.attn_processors
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(FileStore, "write", interrupt)
            tiny.record(SOURCE, placement=tmp_path / "new" / "r", **RUN)
        assert calls == [0, 1]
        assert tiny.unet.attn_processors == before
        assert list(tmp_path.iterdir()) == []
        tiny.record(SOURCE, placement=tmp_path / "new" / "r", **RUN)
        assert edited(tiny, Recording.load(tmp_path / "new" / "r")).shape[0] == 1

    @pytest.mark.parametrize("name", [STEP, "latents.safetensors", "index.json"])
    def test_a_full_disk_leaves_nothing(self, tiny, tmp_path, monkeypatch, name):
        def replace(source, target, rename=os.replace):
            if os.path.basename(target) == name:
                raise OSError(28, "No space left on device")
            rename(source, target)

        monkeypatch.setattr("fpe_pipeline.atomic_folder.os.replace", replace)
        (tmp_path / "r").mkdir()
        with pytest.raises(OSError, match="No space left"):
            tiny.record(SOURCE, placement=tmp_path / "r", **RUN)
        assert list((tmp_path / "r").iterdir()) == []  # the caller's own folder stays

    def test_other_files_of_the_folder_stay(self, tiny, tmp_path, monkeypatch):
        def fail(self, step, tensors):
            (self.folder / "letter.txt").write_text("dear")
            raise RuntimeError("disk on fire")

        monkeypatch.setattr(FileStore, "write", fail)
        with pytest.raises(RuntimeError, match="disk on fire"):
            tiny.record(SOURCE, placement=tmp_path / "r", **RUN)
        assert [path.name for path in (tmp_path / "r").iterdir()] == ["letter.txt"]

    def test_a_refusal_leaves_nothing(self, tiny, tmp_path):
        photo = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
        size = {"num_inference_steps": 2, "height": 24, "width": 32}
        null_text = tiny.invert(photo, SOURCE, method="null-text", **size)
        with pytest.raises(ValueError, match="were optimised for guidance_scale"):
            tiny.record(inversion=null_text, guidance_scale=3.0, placement=tmp_path / "r")
        negative = tiny.invert(photo, SOURCE, method="negative-prompt", **size)
        with pytest.raises(ValueError, match="leave negative_prompt out"):
            tiny.record(inversion=negative, negative_prompt="cars", placement=tmp_path / "r")
        with pytest.raises(ValueError, match="finite"):
            tiny.record(SOURCE, guidance_scale=float("nan"), placement=tmp_path / "r", **RUN)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_holds_something(self, tiny, tmp_path):
        (tmp_path / "letter.txt").write_text("dear")
        with pytest.raises(InputError, match=r"is not empty \(it holds 'letter.txt'\)"):
            tiny.record(SOURCE, placement=tmp_path, **RUN)
        assert (tmp_path / "letter.txt").read_text() == "dear"
        with pytest.raises(InputError, match="cannot record into"):
            tiny.record(SOURCE, placement=tmp_path / "letter.txt", **RUN)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _edit_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda folder: (folder / "index.json").write_text("{"), "is damaged"),
            (lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe\x00"), "is damaged"),
            (lambda folder: (folder / "index.json").write_text("[" * 100_000), "is damaged"),
            (lambda folder: (folder / "index.json").write_text("[]"), "format 7, .* has list"),
            (lambda folder: (folder / "index.json").unlink(), "was not finished: it has no index; record it again"),
            (lambda folder: (folder / STEP).unlink(), "cannot be read"),
            (lambda folder: _cut(folder / STEP), "bytes instead of"),
            (lambda folder: (folder / STEP).write_bytes(b"\xff" * (folder / STEP).stat().st_size), "cannot be read"),
            (lambda folder: shutil.copy(folder / STEP, folder / "latents.safetensors"), "bytes instead of"),
            (lambda folder: _garble(folder / "latents.safetensors"), "its digest is not that"),
            (lambda folder: _edit_index(folder, lambda index: index.update(format=2)), "format 7, .* has 2"),
            (lambda folder: shutil.rmtree(folder), "does not exist"),
        ],
    )
    def test_found_on_load(self, folder, damage, message):
        damage(folder)
        with pytest.raises(InputError, match=message):
            Recording.load(folder)

    @pytest.mark.parametrize(
        "change",
        [
            lambda index: index.pop("digest"),
            lambda index: index.pop("files"),
            lambda index: index.pop("recording"),
            lambda index: index.update(files=[]),
            lambda index: index["files"].pop(STEP),
            lambda index: index["files"][STEP].pop("bytes"),
            lambda index: index["files"].update({f"../source/{STEP}": index["files"][STEP]}),
            lambda index: index["recording"].pop("model"),
            lambda index: index["recording"].update(schedule=None),
            lambda index: index["recording"].update(steps="four"),
            lambda index: index["recording"].update(contents=[]),
            lambda index: index["recording"].update(guidance_scale=2.0),
        ],
    )
    def test_an_index_that_is_not_what_was_written(self, folder, change):
        _edit_index(folder, change)
        with pytest.raises(InputError, match="its index is not what was written; record it again"):
            Recording.load(folder)

    def test_files_are_those_of_the_contents(self, tiny, tmp_path):
        """An index that was written so, not damaged: names lead nowhere else."""
        recorded = tiny.record(SOURCE, placement=tmp_path / "r", **RUN)
        shutil.copy(tmp_path / "r" / STEP, tmp_path / "other.safetensors")
        files = recorded.store._files
        files["../other.safetensors"] = files[STEP]
        recorded.save(recorded.store)
        with pytest.raises(InputError, match=r"disagree about '\.\./other.safetensors'"):
            Recording.load(tmp_path / "r")
        del files["../other.safetensors"], files[STEP]
        recorded.save(recorded.store)
        with pytest.raises(InputError, match=f"disagree about '{STEP}'"):
            Recording.load(tmp_path / "r")

    @pytest.mark.parametrize("change", ["garbled", "zeroed", "swapped"])
    def test_tensors_are_verified_when_they_are_read(self, tiny, folder, change):
        """Damage that leaves sizes and shapes as they are."""
        if change == "garbled":
            _garble(folder / STEP)
        elif change == "zeroed":  # as after a crash, where the size reached the disk and the data did not
            data = (folder / STEP).read_bytes()
            (folder / STEP).write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))
        else:
            (folder / STEP).rename(folder / "other")
            (folder / "step-0000.safetensors").rename(folder / STEP)
            (folder / "other").rename(folder / "step-0000.safetensors")
        recorded = Recording.load(folder)
        with pytest.raises(InputError, match=r"step-000.* is damaged: its digest is not that .*; record it again"):
            edited(tiny, recorded)

    def test_each_file_is_verified_once(self, tiny, folder, monkeypatch):
        verified = []

        def digest(block, blake2b=FileStore._block.__globals__["_digest"]):
            verified.append(block.numel())
            return blake2b(block)

        monkeypatch.setattr("fpe_pipeline.recordings.folder_store._digest", digest)
        recorded = Recording.load(folder)
        first = edited(tiny, recorded)
        assert torch.equal(edited(tiny, recorded), first)
        assert len(verified) == 1 + len(list(folder.glob("step-*")))

    def test_a_file_that_goes_while_the_recording_is_open(self, tiny, folder):
        recorded = Recording.load(folder)
        (folder / STEP).unlink()
        with pytest.raises(InputError, match=f"{STEP}' cannot be read: .*; record it again"):
            edited(tiny, recorded)

    @pytest.mark.parametrize("placement", ["cpu", "folder"])
    def test_copies_and_pickles_serve_as_the_recording_does(self, tiny, folder, placement):
        recorded = Recording.load(folder) if placement == "folder" else tiny.record(SOURCE, placement="cpu", **RUN)
        expected, kept = edited(tiny, recorded), pickle.dumps(recorded)
        assert len(kept) < recorded.nbytes + 20_000  # what is in memory once, of what is in files nothing
        for other in (copy.deepcopy(recorded), pickle.loads(kept)):
            assert torch.equal(edited(tiny, other), expected)
        assert torch.equal(edited(tiny, recorded), expected)


def _garble(path, seed=1):
    """Other values in the second half of a file, behind its header."""
    chance, data = random.Random(seed), bytearray(path.read_bytes())
    for index in range(len(data) // 2, len(data), 7):
        data[index] = chance.randrange(256)
    path.write_bytes(data)
