"""A picture that `fpe edit` wrote holds what repeats it, and nothing of the folders that it came from."""

import json
import shutil

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fpe_pipeline.app import cli
from fpe_pipeline.errors import InputError
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs.picture_record import KEYWORD, is_picture
from tests.support.tiny_cli import SOURCE, TARGET, one_error, tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("somebody") / "private.png"
    Image.linear_gradient("L").resize((96, 80)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def made(model, photo, tmp_path_factory):
    """The folder of an edited photo."""
    folder = tmp_path_factory.mktemp("made")
    arguments = ["--image", str(photo), "--source", SOURCE, "--target", TARGET, "--steps", "2", "--model", str(model)]
    assert cli.main(["edit", *arguments, "--quiet", "-o", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", ["target-1.png", "comparison.png"])
def test_any_picture_repeats_the_run_to_the_bit(made, name, tmp_path, capsys):
    assert cli.main(["edit", "--from", str(made / name), "-o", str(tmp_path), "--quiet"]) == 0
    assert "those of the record, bit for bit" in capsys.readouterr().err
    for path in made.glob("*.png"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_options_beside_a_picture_replace_its_settings(made, tmp_path):
    arguments = ["edit", "--from", str(made / "target-1.png"), "--self-replace", "0.3", "--quiet"]
    assert cli.main([*arguments, "-o", str(tmp_path)]) == 0
    settings, record = runs.read_record(tmp_path / "target-1.png")
    assert settings.self_replace == (0.0, 0.3) and settings.targets == (TARGET,)
    assert record["picture"] == "target-1.png"


def test_a_folder_that_is_moved_repeats_its_photo(made, photo, tmp_path):
    moved = shutil.copytree(made, tmp_path / "moved")
    settings, _ = runs.read_record(moved / "source.png")
    assert settings.image == str(moved / "photo.png")


def test_no_picture_names_the_folder_of_the_photo(made, photo):
    for path in made.glob("*.png"):
        with Image.open(path) as picture:
            assert str(photo.parent) not in picture.info[KEYWORD] and "created" not in json.loads(picture.info[KEYWORD])


def _with_text(path, text):
    info = PngInfo()
    info.add_text(KEYWORD, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_pictures_without_a_record_are_refused(tmp_path, capsys):
    bare, other, cut = tmp_path / "bare.png", _with_text(tmp_path / "other.png", "{}"), tmp_path / "cut.png"
    Image.new("RGB", (8, 8)).save(bare)
    cut.write_bytes(bare.read_bytes()[:20])
    for path, reason in ((bare, "a picture without a record"), (other, "run record of format"), (cut, "damaged")):
        assert is_picture(path)
        assert cli.main(["edit", "--from", str(path), "-o", str(tmp_path / "out")]) == 2
        assert reason in one_error(capsys)
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.jpg")  # what becomes of a PNG that was sent on
    with pytest.raises(InputError, match="a picture in another format keeps no record; pass the PNG as fpe wrote it"):
        runs.read_record(tmp_path / "bare.jpg")
    with pytest.raises(InputError, match="is not a run record"):
        runs.read_record(_with_text(tmp_path / "text.png", "not JSON"))
