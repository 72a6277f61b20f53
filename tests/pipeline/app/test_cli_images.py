"""`fpe edit --image`: a picture in, its edits out, and a record that repeats them bit for bit."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpe_pipeline import FreePromptPipeline
from fpe_pipeline.app import cli
from fpe_pipeline.images.distance import pixel_hash
from fpe_pipeline.inversion import trajectory as inversion
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs import settings
from tests.support.golden_cases import GOLDEN
from tests.support.tiny_cli import OTHER, SOURCE, TARGET, tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model, with 64 px as its own size and a scheduler whose steps cannot be undone."""
    folder = tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny", without=("scheduler", "model_index.json"))
    tiny = GOLDEN / "models" / "tiny-sd15"
    (folder / "scheduler").mkdir()
    index = json.loads((tiny / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    scheduler = json.loads((tiny / "scheduler" / "scheduler_config.json").read_text())
    kept = ("beta_start", "beta_end", "beta_schedule", "steps_offset", "set_alpha_to_one", "num_train_timesteps")
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **{name: scheduler[name] for name in kept}}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 130, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def edit(model, photo):
    return [
        "edit", "--image", str(photo), "--source", SOURCE, "--target", TARGET, "--target", OTHER, "--model", str(model),
        "--steps", "2", "--quiet",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(edit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    assert cli.main([*edit, "--inversion", "direct", "-o", str(folder)]) == 0
    return folder


def test_the_methods_are_those_of_inversion():
    assert settings.INVERSIONS == inversion.METHODS


def test_files_and_record(made, photo):
    record = json.loads((made / "run.json").read_text())
    assert record["settings"]["image"] == str(photo)
    assert record["settings"]["inversion"] == "direct"
    assert record["model"]["scheduler"]["class"] == "DDIMScheduler"
    assert set(record["seconds"]) == {"load", "invert", "edit", "no control"}
    assert record["images"]["source.png"]["role"] == "reconstruction"
    sizes = {Image.open(made / name).size for name in record["images"]}
    assert sizes == {(96, 40)}  # 130 x 60 at about 64 x 64 pixels
    for name, image in record["images"].items():
        assert pixel_hash(Image.open(made / name)) == image["pixels_sha256"]
    assert len({image["pixels_sha256"] for image in record["images"].values()}) == 6


def test_the_photo_stands_beside_its_reconstruction(edit, tmp_path, monkeypatch):
    drawn = []

    def side_by_side(rows, **labels):
        drawn.append((rows, labels["reconstruction_label"]))
        return draw(rows, **labels)

    draw = runs.side_by_side
    monkeypatch.setattr(runs, "side_by_side", side_by_side)
    assert cli.main([*edit, "--no-control", "-o", str(tmp_path)]) == 0
    ((rows, label),) = drawn
    photo, source = (Image.open(tmp_path / name) for name in ("photo.png", "source.png"))
    error = np.square(np.subtract(photo, source, dtype=np.float64)).mean()
    assert label == f"reconstruction, {10 * np.log10(255**2 / error):.1f} dB"
    for shown in rows:
        assert shown.source.tobytes() == photo.tobytes() and shown.reconstruction.tobytes() == source.tobytes()


def test_same_bits_from_the_record(made, tmp_path, capsys):
    assert cli.main(["edit", "--from", str(made / "run.json"), "-o", str(tmp_path), "--quiet"]) == 0
    assert "those of the record, bit for bit" in capsys.readouterr().err
    for path in made.glob("*.png"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_another_picture_of_that_name_is_refused(made, edit, photo, tmp_path, capsys):
    record = json.loads((made / "run.json").read_text())
    other = tmp_path / "other.png"
    Image.new("RGB", (130, 60)).save(other)
    record["settings"]["image"] = str(other)
    (tmp_path / "run.json").write_text(json.dumps(record))
    arguments = ["edit", "--from", str(tmp_path / "run.json"), "-o", str(tmp_path / "out"), "--quiet"]
    assert cli.main(arguments) == 2
    assert "is not the picture of the record" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*arguments, "--image", str(other)]) == 0


@pytest.mark.parametrize("method", ["ddim", "null-text", "negative-prompt"])
def test_every_method(edit, made, tmp_path, method):
    arguments = [*edit, "--inversion", method, "--no-control", "--size", "64x48", "-o", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert Image.open(tmp_path / "target-2.png").size == (64, 48)
    assert not (tmp_path / "target-1-no-control.png").exists()


def test_a_picture_needs_no_words(edit, tmp_path):
    start = edit.index("--source")
    assert cli.main([*edit[:start], *edit[start + 2 :], "--no-control", "-o", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["source"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "nowhere.png"], "cannot read 'nowhere.png'"),
        (["--image", __file__], "is not a picture"),
        (["--image", "https://a.org/b.png"], "download the picture and pass its path"),
        (["--inversion", "edict"], "inversion must be one of ddim, direct, null-text, negative-prompt"),
        (["--inversion", "null-text", "--guidance", "1"], "lives in the unconditional half"),
        (["--inversion", "negative-prompt", "--negative", "boats"], "leave --negative out"),
        (["--inversion", "null-text", "--inversion-guidance", "3"], "follows the unguided trajectory"),
        (["--inversion-guidance", "nan"], "must be a finite number"),
        (["--inversion", "null-text", "--inner-steps", "0"], "inner_steps must be at least 1, got 0"),
        (["--inversion", "null-text", "--early-stop", "-1"], "early_stop must be at least 0, got -1.0"),
        (["--inversion", "null-text", "--early-stop", "inf"], "early_stop must be a finite number"),
        (["--inner-steps", "3"], "pass --inversion null-text as well"),
        (["--size", "60x64"], "use 56x64 or 64x64"),
    ],
)
def test_refusals_before_loading(edit, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(runs, "load_pipeline", lambda *a, **k: pytest.fail("weights were loaded before the checks"))
    assert cli.main([*edit, *options, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="needs pipes with names, as shells give them")
def test_a_pipe_is_refused_by_what_it_is(edit, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "load_pipeline", lambda *a, **k: pytest.fail("weights were loaded before the checks"))
    end, begin = os.pipe()
    try:
        os.write(begin, photo.read_bytes())
        os.close(begin)
        assert cli.main([*edit, "--image", f"/dev/fd/{end}", "-o", str(tmp_path / "out")]) == 2
    finally:
        os.close(end)
    assert "is a pipe or a device, which can be read once: expected a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "p2p-replace", "--target", "a photo of a big red car"], "word"),
        (["--layers", "99"], "layers [99] match none"),
        (["--levels", "9"], "match none"),
        (["--max-tokens", "1"], "match none"),
    ],
)
def test_words_and_layers_are_refused_before_the_inversion(edit, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(FreePromptPipeline, "invert", lambda *a, **k: pytest.fail("inverted before the checks"))
    assert cli.main([*edit, *options, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_settings_of_the_optimisation_reach_it_and_the_record(edit, tmp_path, monkeypatch, capsys):
    found, invert = [], FreePromptPipeline.invert

    def inverted(pipe, *arguments, method, **options):
        found.append(method)
        return invert(pipe, *arguments, method=method, **options)

    monkeypatch.setattr(FreePromptPipeline, "invert", inverted)
    options = ["--inversion", "null-text", "--inner-steps", "3", "--early-stop", "0.5", "--no-control"]
    assert cli.main([*edit, *options, "-o", str(tmp_path / "made")]) == 0
    record = str(tmp_path / "made" / "run.json")
    assert cli.main(["edit", "--from", record, "--quiet", "-o", str(tmp_path / "again")]) == 0
    assert "bit for bit" in capsys.readouterr().err
    assert [(method.inner_steps, method.early_stop, method.guidance_scale) for method in found] == [(3, 0.5, 7.5)] * 2


def test_inversion_options_without_a_picture(capsys):
    arguments = ["edit", "--source", SOURCE, "--target", TARGET, "--inversion", "direct"]
    assert cli.main(arguments) == 2
    assert "pass it with --image" in capsys.readouterr().err
