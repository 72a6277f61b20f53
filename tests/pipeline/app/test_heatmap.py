"""`fpe heatmap`: where words act, in a picture of a prompt, of an earlier run, or of one's own."""

import json

import numpy as np
import pytest
from PIL import Image

from fpe_pipeline import heat_maps
from fpe_pipeline.app import cli
from fpe_pipeline.images.distance import distance, pixel_hash
from fpe_pipeline.runs import heat as heats
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs.settings import Settings
from tests.support.tiny_cli import SOURCE, edit_arguments, one_error, refuse_loading, tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def options(model):
    return ["--model", model, "--steps", "2"]


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert cli.main([*edit_arguments(model), "--no-control", "-o", str(folder)]) == 0
    return folder


def read(folder):
    return json.loads((folder / "heat.json").read_text())


def test_a_picture_of_a_prompt(options, model, tmp_path, capsys):
    words = ["--word", "car", "--word", "red car"]
    assert cli.main(["heatmap", SOURCE, *words, *options, "--seed", "3", "-o", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    names = ["heat", "source", "source-car", "source-red-car"]
    files = [*(f"{name}.png" for name in names), *(f"{name}.npy" for name in names[2:]), "heat.json"]
    assert out.split() == [str(tmp_path / name) for name in files]
    assert "fpe: source, 'car': " in err and "of the attention" in err

    settings = Settings(SOURCE, (), model=model, steps=2, seed=3)
    with runs.at_work(settings) as loaded, heat_maps(loaded.pipe, ["car", "red car"]) as maps:
        (picture,) = heats.denoised(settings, loaded.pipe, [SOURCE], num_inference_steps=2, guidance_scale=7.5).images
    assert pixel_hash(picture) == pixel_hash(Image.open(tmp_path / "source.png"))
    found = {each["word"]: each for each in read(tmp_path)["heat"]}
    for word, each in found.items():
        heat = np.load(tmp_path / each["file"])
        assert heat.dtype == np.float32 and each["grid"] == [*heat.shape[::-1]]
        np.testing.assert_array_equal(heat, maps.word(word))
        assert each["share"] == pytest.approx(heat.mean(), abs=1e-6)
        assert each["most"] == pytest.approx(heat.max(), abs=1e-6)
        x, y = (int(place // (64 / side)) for place, side in zip(each["place"], each["grid"], strict=True))
        assert heat[y, x] == heat.max()
    assert found["red car"]["share"] > found["car"]["share"]
    assert read(tmp_path)["settings"]["seed"] == 3
    reds = [np.asarray(Image.open(tmp_path / f"{name}.png"), np.int16)[..., 0] for name in ("source", "source-car")]
    assert reds[0].shape == reds[1].shape and (reds[0] != reds[1]).any()


@pytest.mark.slow
def test_pictures_of_an_earlier_run(made, tmp_path, capsys):
    arguments = ["heatmap", "--from", str(made / "target-2.png"), "--word", "car", "--word", "boat", "--quiet"]
    assert cli.main([*arguments, "--json", "-o", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(each["picture"], each["word"]) for each in said["heat"]] == [
        ("source", "car"), ("target-1", "car"), ("target-2", "boat")
    ]  # fmt: skip
    for name in ("source", "target-1", "target-2"):
        assert distance(*(Image.open(folder / f"{name}.png") for folder in (tmp_path, made))).levels <= 2


def test_a_picture_of_ones_own(options, tmp_path):
    photo = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(photo)
    arguments = ["heatmap", SOURCE, "--image", str(photo), "--inversion", "direct", "--word", "car", *options]
    assert cli.main([*arguments, "--quiet", "-o", str(tmp_path / "out")]) == 0
    assert pixel_hash(Image.open(tmp_path / "out" / "photo.png")) == pixel_hash(Image.open(photo))
    assert [each["picture"] for each in read(tmp_path / "out")["heat"]] == ["source"]
    assert set(read(tmp_path / "out")["seconds"]) == {"load", "invert", "read"}


def test_words_that_are_not_there(options, tmp_path, capsys):
    arguments = ["heatmap", SOURCE, *options, "--quiet", "-o", str(tmp_path / "out")]
    assert cli.main([*arguments, "--word", "dragon"]) == 2
    assert "the words ['dragon'] are in none of the prompts" in one_error(capsys)
    assert not (tmp_path / "out").exists()


def test_a_word_that_the_model_does_not_know_is_read_and_said(options, tmp_path, capsys):
    prompt = "a photo of a zyzzyva"
    assert cli.main(["heatmap", prompt, "--word", "zyzzyva", *options, "--quiet", "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("does not know 'zyzzyva'") == 1


def test_words_whose_files_would_have_one_name():
    assert heats._file_names(["red car", "red-car", "Red Car", "caf\u00e9"]) == {
        "red car": "red-car", "red-car": "red-car-2", "Red Car": "Red-Car-3", "caf\u00e9": "caf\u00e9"
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([SOURCE], "pass --word, once for each"),
        (["--word", "car"], "expected a prompt, whose words --word names, or --from"),
        ([SOURCE, "--word", "car", "--image", "nowhere.png"], "cannot read 'nowhere.png'"),
        ([SOURCE, "--word", "car", "--image", __file__], "is not a picture"),
        ([SOURCE, "--word", "car", "--inversion", "direct"], "pass it with --image"),
        (["--from", "nowhere.json", "--word", "car"], "cannot read 'nowhere.json'"),
        ([SOURCE, "--from", "nowhere.json", "--word", "car"], "leave source out"),
        ([" ", "--word", "car"], "the source prompt is empty"),
        ([SOURCE, "--word", "car", "--steps", "0"], "steps must be at least 1"),
    ],
)
def test_refusals_before_weights_are_read(arguments, reason, tmp_path, monkeypatch, capsys):
    refuse_loading(monkeypatch)
    assert cli.main(["heatmap", *arguments, "-o", str(tmp_path / "out")]) == 2
    assert reason in one_error(capsys)
    assert not (tmp_path / "out").exists()
