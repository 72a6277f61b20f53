"""`fpe` on Stable Diffusion XL: its own guidance, photos, recordings and words."""

import json

import pytest
from PIL import Image

from fpe_pipeline.app import cli
from fpe_pipeline.models.sources import find_model
from tests.support.free_prompt_pipelines import free_prompt_xl_pipeline
from tests.support.tiny_cli import SOURCE, TARGET, one_error, refuse_loading


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("xl")
    free_prompt_xl_pipeline(pipe).save_pretrained(path)
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((32, 24)).convert("RGB").save(path)
    return path


def run(*arguments):
    return cli.main([*map(str, arguments), "--quiet"])


def test_it_is_found_by_its_kind(folder):
    found = find_model(str(folder))
    assert (found.family, found.served.is_unet, found.vae_factor) == ("sdxl", True, 2)


def test_a_picture_is_edited_and_its_record_repeats_it(folder, tmp_path, capsys):
    edit = ["edit", "--source", SOURCE, "--target", TARGET, "--model", folder, "--steps", 3, "-o", tmp_path / "made"]
    assert run(*edit) == 0
    record = json.loads((tmp_path / "made" / "run.json").read_text())
    assert record["model"]["class"] == "FreePromptXLPipeline"
    assert record["settings"]["guidance"] == 5.0
    names = ("source", "target-1", "target-1-no-control")
    assert len({Image.open(tmp_path / "made" / f"{name}.png").tobytes() for name in names}) == 3
    capsys.readouterr()
    assert cli.main(["edit", "--from", str(tmp_path / "made" / "run.json"), "-o", str(tmp_path / "again")]) == 0
    assert "bit for bit" in capsys.readouterr().err


@pytest.mark.slow
def test_a_photo_and_its_recording(folder, photo, tmp_path):
    model = ["--model", folder, "--steps", 3]
    sources = [
        "--image",
        photo,
        "--source",
        SOURCE,
        "--target",
        TARGET,
        "--inversion",
        "direct",
        "--method",
        "p2p-replace",
    ]
    assert run("edit", *sources, *model, "-o", tmp_path / "made") == 0
    assert run("invert", photo, "--prompt", SOURCE, *model, "-o", tmp_path / "kept") == 0
    assert run("edit", "--recording", tmp_path / "kept", "--target", TARGET, "-o", tmp_path / "edited") == 0
    assert Image.open(tmp_path / "edited" / "target-1.png").size == Image.open(tmp_path / "made" / "target-1.png").size


def test_where_words_act(folder, tmp_path):
    assert run("heatmap", SOURCE, "--word", SOURCE.split()[-1], "--model", folder, "--steps", 3, "-o", tmp_path) == 0
    assert any(tmp_path.glob("*.png"))


def test_methods_of_transformers_are_refused(folder, tmp_path, capsys, monkeypatch):
    refuse_loading(monkeypatch)
    edit = [
        "edit",
        "--source",
        SOURCE,
        "--target",
        TARGET,
        "--model",
        folder,
        "--method",
        "consistedit",
        "-o",
        tmp_path / "o",
    ]
    assert run(*edit) == 2
    assert "is a UNet of SDXL's kind; its methods are fpe, " in one_error(capsys)
