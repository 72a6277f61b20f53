"""`fpe edit` and `fpe evaluate` on transformers: their methods, defaults and inversions, and what they are refused."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from fpe_pipeline.app import cli
from fpe_pipeline.images.distance import distance
from fpe_pipeline.models.sources import find_model
from fpe_pipeline.runs.model_defaults import defaults_for
from fpe_pipeline.runs.settings import Settings
from tests.support.saved_transformers import make_flux_small, saved_transformer
from tests.support.tiny_cli import OTHER, SOURCE, TARGET, evaluation, one_error, refuse_loading

CLASSES = {"sd3": "FreePromptSD3Pipeline", "flux": "FreePromptFluxPipeline"}


@pytest.fixture(scope="module")
def folders(pipe, tmp_path_factory):
    """A saved pipeline of each family, with a scheduler that diffusers loads; FLUX.1's own size is 64 px."""
    return {family: saved_transformer(pipe, family, tmp_path_factory.mktemp(family)) for family in ("sd3", "flux")}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_flux_small(monkeypatch)


def arguments(folder, *more):
    return ["edit", "--source", SOURCE, "--target", TARGET, "--model", str(folder), "--steps", "5", "--quiet", *more]


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_picture_is_edited_and_its_record_repeats_it(family, folders, tmp_path, capsys):
    assert cli.main(arguments(folders[family], "-o", str(tmp_path / "made"))) == 0
    record = json.loads((tmp_path / "made" / "run.json").read_text())
    assert record["model"]["class"] == CLASSES[family]
    assert record["settings"]["self_replace"] == [0.0, 0.2]  # of joint attention
    pictures = [Image.open(tmp_path / "made" / f"{name}.png") for name in ("source", "target-1", "target-1-no-control")]
    assert {picture.size for picture in pictures} == {(64, 64)}
    assert len({picture.tobytes() for picture in pictures}) == 3
    capsys.readouterr()
    assert cli.main(["edit", "--from", str(tmp_path / "made" / "run.json"), "-o", str(tmp_path / "again")]) == 0
    assert "bit for bit" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("inversion", ["direct", "free"])
def test_a_photo_is_inverted_along_the_flow(family, inversion, folders, tmp_path):
    photo = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((80, 64)).convert("RGB").save(photo)
    more = ["--image", str(photo), "--inversion", inversion, "--method", "consistedit", "--size", "48x32"]
    assert cli.main(arguments(folders[family], *more, "-o", str(tmp_path / "made"))) == 0
    record = json.loads((tmp_path / "made" / "run.json").read_text())
    assert record["model"]["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert Image.open(tmp_path / "made" / "source.png").size == (48, 32)


@pytest.mark.parametrize("family", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_a_photo_is_recorded_for_edits_and_read_for_words(family, folders, tmp_path):
    photo = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(photo)
    common = ["--model", str(folders[family]), "--steps", "4", "--quiet", "-o"]
    assert cli.main(["invert", str(photo), "--prompt", SOURCE, *common, str(tmp_path / "kept")]) == 0
    kept, whole = (Image.open(tmp_path / "kept" / f"{name}.png") for name in ("photo", "source"))
    assert distance(kept, whole).psnr == json.loads((tmp_path / "kept" / "run.json").read_text())["psnr"]
    edit = ["edit", "--target", TARGET, "--self-replace", "0.5", "--no-control"]
    recorded = [*edit, "--recording", str(tmp_path / "kept"), "--quiet", "-o", str(tmp_path / "recorded")]
    assert cli.main(recorded) == 0
    assert cli.main([*edit, "--image", str(photo), "--source", SOURCE, *common, str(tmp_path / "whole")]) == 0
    made = [Image.open(tmp_path / folder / "target-1.png") for folder in ("recorded", "whole")]
    assert distance(*made).levels <= 3
    swap = ["edit", "--target", TARGET, "--method", "p2p-replace", "--no-control"]  # which places words
    assert cli.main([*swap, "--recording", str(tmp_path / "kept"), "--quiet", "-o", str(tmp_path / "swapped")]) == 0
    assert cli.main([*swap, "--image", str(photo), "--source", SOURCE, *common, str(tmp_path / "swap")]) == 0
    made = [Image.open(tmp_path / folder / "target-1.png") for folder in ("swapped", "swap")]
    assert distance(*made).levels <= 3
    heat = ["heatmap", "--from", str(tmp_path / "recorded" / "target-1.png"), "--word", "car", "--word", "blue"]
    assert cli.main([*heat, "--quiet", "-o", str(tmp_path / "heat")]) == 0
    read = json.loads((tmp_path / "heat" / "heat.json").read_text())["heat"]
    assert [(each["picture"], each["word"]) for each in read] == [
        ("source", "car"), ("target-1", "car"), ("target-1", "blue")
    ]  # fmt: skip
    assert all(0 < each["share"] <= each["most"] < 1 for each in read)


def test_a_background_is_kept(folders, tmp_path, capsys):
    """KV-Edit by its name: where the mask is white the picture is its source's, and a mask has to be given."""
    mask = Image.new("L", (64, 64), 255)
    mask.paste(0, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    more = ["--method", "kv-edit", "--option", f"mask={tmp_path / 'mask.png'}", "--no-control"]
    assert cli.main(arguments(folders["sd3"], *more, "-o", str(tmp_path / "made"))) == 0
    assert json.loads((tmp_path / "made" / "run.json").read_text())["settings"]["method"] == "kv-edit"
    capsys.readouterr()
    assert cli.main(arguments(folders["sd3"], "--method", "kv-edit", "-o", str(tmp_path / "none"))) == 2
    assert "kv-edit needs the option mask" in one_error(capsys)


@pytest.mark.parametrize(
    "family, more, reason",
    [
        ("sd3", ["--method", "pnp"], "pnp edits UNets, and model"),
        ("sd3", ["--levels", "1"], "--levels choose layers of a UNet"),
        ("flux", ["--max-tokens", "64"], "--max-tokens choose layers of a UNet"),
        ("flux", ["--negative", "rain"], "leave --negative out"),
        ("sd3", ["--size", "40x64"], "positive multiples of 16 px for this model's tokens"),
    ],
)
def test_what_transformers_are_refused_before_weights_are_read(family, more, reason, folders, monkeypatch, capsys):
    refuse_loading(monkeypatch)
    assert cli.main(arguments(folders[family], *more)) == 2
    assert reason in one_error(capsys)


def test_inversions_are_each_kinds_own(folders, tmp_path, monkeypatch, capsys):
    refuse_loading(monkeypatch)
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64)).save(photo)
    assert cli.main(arguments(folders["sd3"], "--image", str(photo), "--inversion", "null-text")) == 2
    assert "it has direct, reference, free" in one_error(capsys)
    unet = arguments("embedded")
    assert cli.main([*unet, "--image", str(photo), "--inversion", "free"]) == 2
    assert "it has ddim, direct, null-text, negative-prompt" in one_error(capsys)
    assert cli.main([*unet, "--method", "consistedit"]) == 2
    assert "consistedit edits transformers, and model 'embedded' is a UNet" in one_error(capsys)


def test_defaults_are_the_models_own_where_nothing_is_said(folders):
    prompts = {"source": SOURCE, "targets": (OTHER,)}
    found = {family: Settings.of_model(**prompts, model=str(folder)) for family, folder in folders.items()}
    chosen = {family: (made.steps, made.guidance, made.self_replace) for family, made in found.items()}
    assert chosen == {"sd3": (28, 7.0, (0.0, 0.2)), "flux": (28, 3.5, (0.0, 0.2))}
    said = Settings.of_model(**prompts, model=str(folders["flux"]), steps=4, self_replace=(0.0, 0.5))
    assert (said.steps, said.self_replace, said.inversion) == (4, (0.0, 0.5), "direct")
    assert Settings.of_model(**prompts) == Settings(SOURCE, (OTHER,))
    assert evaluation("--model", folders["sd3"]).self_replace == 0.2
    assert find_model(str(folders["flux"])).family == "flux"


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_methods_are_compared_on_pictures_of_ones_own(family, folders, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save(pictures / "a.png")
    prompts = [{"image": "a.png", "source": SOURCE, "target": TARGET}]
    (pictures / "prompts.json").write_text(json.dumps(prompts))
    asked = ["evaluate", "--images", pictures, "--model", folders[family], "--steps", "3", "--text-tokens", "12"]
    asked += ["--methods", "no edit", "different noise", "fpe", "consistedit", "stable-flow", "-o", tmp_path / "out"]
    assert cli.main([*map(str, asked), "--quiet"]) == 0
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["scores"]
    scores = [dict(zip(rows["columns"], row, strict=True)) for row in rows["rows"]]
    reasons = {score["method"]: score["reason"] for score in scores}
    assert [method for method, reason in reasons.items() if reason] == ["stable-flow"]
    assert "known for FLUX.1" in reasons["stable-flow"] and "\n" not in reasons["stable-flow"]
    assert {score["origin"] for score in scores} == {"direct"}
    held = [score["reconstruction"] for score in scores if score["method"] == "fpe"]
    assert held == pytest.approx([score["autoencoder"] for score in scores if score["method"] == "fpe"], abs=0.5)


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--sweep"], "--sweep varies the levels of a UNet"),
        (["--images", "held-out", "--inversion", "ddim"], "they have direct, reference, free"),
        (["--images", "held-out", "--methods", "pnp"], "unknown methods 'pnp' of a transformer"),
    ],
)
def test_what_an_evaluation_of_a_transformer_is_refused(more, reason, folders, tmp_path, capsys):
    (folders["sd3"] / "judge.safetensors").touch()  # of which nothing is read before the refusal
    assert cli.main(["evaluate", "--model", str(folders["sd3"]), *more, "-o", str(tmp_path)]) == 2
    assert reason in one_error(capsys)


@pytest.mark.parametrize("command", ["edit", "batch", "evaluate", "heatmap", "invert"])
def test_help_says_what_models_take_where_nothing_is_said(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    assert cli.main([command, "--help"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "or the model's own: fpe info lists them" in line]
    own = {"steps": "default: 50, ", "guidance": "default: 7.5, "}
    if command not in ("heatmap", "invert"):
        own["self-replace"] = "default: 0.8, "
    assert len(lines) == len(own)
    for name, told in own.items():
        assert any(f"--{name} " in line and told in line for line in lines), name


def test_info_says_what_models_take_where_nothing_is_said(capsys):
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^  Stable Diffusion 3 +steps 28, guidance 7, self-replace 0.2; inverted by dir", told, re.M)
    assert re.search(r"^  PixArt +steps 20, guidance 4.5, self-replace 0.8; inverted by ddim, direct, ", told, re.M)
    lines = [line for line in told.splitlines() if "; inverted by " in line]
    (column,) = {line.index("steps ") for line in lines}
    assert all(line[column - 2 : column] == "  " for line in lines)  # the longest name too
    assert defaults_for("embedded-sd3", {})["guidance"] == 7.0
