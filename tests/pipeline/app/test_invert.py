"""`fpe invert` and `fpe edit --recording`: a picture inverted once, and edits that do not denoise it again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpe_pipeline import FreePromptPipeline
from fpe_pipeline.app import cli
from fpe_pipeline.images.distance import distance, pixel_hash
from fpe_pipeline.recordings.recording import Recording
from fpe_pipeline.runs import recording_folder
from fpe_pipeline.runs import run as runs
from tests.support.tiny_cli import OTHER, SOURCE, TARGET, one_error, refuse_loading, tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 130, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def options(model):
    return ["--model", model, "--steps", "2", "--inversion", "direct"]


@pytest.fixture(scope="module")
def inverted(photo, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inverted") / "made"
    arguments = ["invert", str(photo), "--prompt", SOURCE, *options, "--quiet", "-o", str(folder)]
    assert cli.main(arguments) == 0
    return folder


def test_files_and_how_exactly_the_picture_comes_back(inverted):
    record = json.loads((inverted / "run.json").read_text())
    cut, back = (Image.open(inverted / name) for name in ("photo.png", "source.png"))
    assert cut.size == back.size == (96, 40)
    assert record["psnr"] == distance(cut, back).psnr
    assert set(record["seconds"]) == {"load", "invert", "record"}
    assert record["settings"]["targets"] == []
    assert Recording.load(inverted / "recording").prompt == SOURCE


@pytest.mark.slow
def test_edits_from_it_are_those_of_the_picture(inverted, photo, options, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    shutil.copytree(inverted, moved)
    whole = ["edit", "--image", str(photo), "--source", SOURCE, "--target", TARGET, "--target", OTHER, *options]
    assert cli.main([*whole, "--quiet", "-o", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(FreePromptPipeline, "invert", lambda *a, **k: pytest.fail("inverted again"))
    edit = ["edit", "--recording", str(moved), "--target", TARGET, "--target", OTHER, "--quiet"]
    assert cli.main([*edit, "-o", str(tmp_path / "from")]) == 0
    names = ["source.png", *(f"target-{n}{end}.png" for n in (1, 2) for end in ("", "-no-control"))]
    for name in names:
        pair = [Image.open(tmp_path / folder / name) for folder in ("whole", "from")]
        assert distance(*pair).levels <= 3, name
    settings, record = runs.read_record(tmp_path / "from" / "run.json")
    assert settings.targets == (TARGET, OTHER) and settings.steps == 2
    assert record["images"]["photo.png"]["pixels_sha256"] == pixel_hash(Image.open(inverted / "photo.png"))


@pytest.mark.slow
def test_a_run_from_it_repeats_without_it(inverted, tmp_path, capsys):
    edit = ["edit", "--recording", str(inverted), "--target", TARGET, "--no-control", "--quiet"]
    assert cli.main([*edit, "--method", "p2p-replace", "-o", str(tmp_path / "from")]) == 0
    assert cli.main(["edit", "--from", str(tmp_path / "from" / "run.json"), "-o", str(tmp_path / "again")]) == 0
    pair = [Image.open(tmp_path / folder / "target-1.png") for folder in ("from", "again")]
    assert distance(*pair).levels <= 3


@pytest.mark.slow
def test_the_run_of_the_record_is_another_target(inverted, tmp_path):
    """Without the recording: the picture is inverted anew."""
    arguments = ["edit", "--from", str(inverted / "run.json"), "--target", TARGET, "--no-control", "--quiet"]
    assert cli.main([*arguments, "-o", str(tmp_path)]) == 0
    assert (tmp_path / "target-1.png").exists()


def test_an_edit_that_needs_more_is_told_how_to_have_it(inverted, tmp_path, capsys):
    edit = ["edit", "--target", TARGET, "--no-control", "--quiet", "--method", "masactrl", "--option", "start_step=1"]
    assert cli.main([*edit, "--recording", str(inverted), "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "the recording lacks" in err and "fpe invert --method masactrl" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_recording_for_a_method(photo, options, tmp_path):
    edit = ["edit", "--target", TARGET, "--no-control", "--quiet", "--method", "masactrl", "--option", "start_step=4"]
    arguments = ["invert", str(photo), "--prompt", SOURCE, *options, "--steps", "6", "--precision", "half"]
    arguments += ["--method", "masactrl", "--quiet", "-o", str(tmp_path / "wide")]
    assert cli.main(arguments) == 0
    assert cli.main([*edit, "--recording", str(tmp_path / "wide"), "-o", str(tmp_path / "out")]) == 0


@pytest.mark.slow
def test_json(photo, options, tmp_path, capsys):
    arguments = ["invert", str(photo), *options, "--json", "--quiet", "-o", str(tmp_path / "made")]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said["files"][-1] == str(tmp_path / "made" / "run.json") and said["bytes"] > 0 and err == ""
    assert said["psnr"] == pytest.approx(said["record"]["psnr"], abs=1e-3)


@pytest.mark.parametrize(
    "more, reason",
    [
        (["nowhere.png"], "cannot read 'nowhere.png'"),
        ([__file__], "is not a picture"),
        (["PHOTO", "--inversion", "free"], "it has ddim, direct, null-text, negative-prompt"),
        (["PHOTO", "--inner-steps", "3"], "pass --inversion null-text as well"),
        (["PHOTO", "--method", "magic"], "method must be one of"),
        (["PHOTO", "--method", "consistedit"], "consistedit edits transformers"),
        (["PHOTO", "--precision", "double"], "--precision is one of exact, half, int8-keys"),
        (["PHOTO", "-o", "INVERTED"], "holds recording and run.json already"),
    ],
)
def test_refusals_before_weights_are_read(more, reason, photo, inverted, model, tmp_path, monkeypatch, capsys):
    refuse_loading(monkeypatch)
    monkeypatch.chdir(tmp_path)
    names = {"PHOTO": str(photo), "INVERTED": str(inverted)}
    assert cli.main(["invert", *(names.get(word, word) for word in more), "--model", model]) == 2
    assert reason in one_error(capsys)
    assert not list(tmp_path.iterdir())


def test_a_recording_that_was_killed_is_called_so(photo, model, tmp_path, monkeypatch, capsys):
    refuse_loading(monkeypatch)
    Path(tmp_path, "out", "recording").mkdir(parents=True)
    Path(tmp_path, "out", "recording", "step-0000.safetensors").write_bytes(b"")
    assert cli.main(["invert", str(photo), "--model", model, "-o", str(tmp_path / "out")]) == 2
    assert "is a recording that was not finished" in (said := one_error(capsys)) and "delete it" in said


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--source", "a cat", "--steps", "9"], "leave --source, --steps out"),
        (["--sweep", "guidance=1,2"], "leave --sweep out"),
        (["--from", "run.json"], "leave --from out"),
        (["--method", "magic"], "method must be one of"),
    ],
)
def test_a_recording_decides_its_source(more, reason, inverted, tmp_path, monkeypatch, capsys):
    refuse_loading(monkeypatch)
    edit = ["edit", "--recording", str(inverted), "--target", TARGET, "-o", str(tmp_path / "out")]
    assert cli.main([*edit, *more]) == 2
    assert reason in one_error(capsys)


def test_a_folder_that_is_none_or_was_changed(inverted, tmp_path, monkeypatch, capsys):
    refuse_loading(monkeypatch)
    edit = ["edit", "--target", TARGET, "-o", str(tmp_path / "out"), "--recording"]
    assert cli.main([*edit, str(tmp_path)]) == 2
    assert "holds no recorded picture; make one with fpe invert" in one_error(capsys)
    shutil.copytree(inverted, tmp_path / "changed")
    Image.new("RGB", (96, 40)).save(tmp_path / "changed" / "photo.png")
    assert cli.main([*edit, str(tmp_path / "changed")]) == 2
    assert "is not the picture that was recorded" in one_error(capsys)
    assert cli.main(["edit", "--recording", str(inverted), "-o", str(tmp_path / "out")]) == 2
    assert "pass --target" in one_error(capsys)


def test_a_method_that_must_know_its_targets(photo, options, tmp_path, capsys):
    arguments = ["invert", str(photo), "--prompt", SOURCE, *options, "--quiet", "-o", str(tmp_path / "made")]
    assert cli.main([*arguments, "--method", "fpe-regional"]) == 2
    assert "fpe-regional cannot be recorded for before its targets are known" in one_error(capsys)
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(photo, options, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording_folder, "staged", full)
    arguments = ["invert", str(photo), "--prompt", SOURCE, *options, "--quiet", "-o", str(tmp_path / "made")]
    assert cli.main(arguments) == 1
    assert not (tmp_path / "made" / "recording").exists()
