"""`fpe edit --sweep` and `--images`: a run for each value, from one model, and a sheet of them that can be read."""

import json

import pytest
from PIL import Image

from fpe_pipeline.app import cli
from fpe_pipeline.errors import InputError
from fpe_pipeline.images.contact_sheet import contact_sheet
from fpe_pipeline.images.distance import distance
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs import sweep as sweeps
from fpe_pipeline.runs.sweep import Axis, parsed_axis
from tests.support.tiny_cli import SOURCE, TARGET, edit_arguments, one_error, refuse_loading, tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def one(model):
    return ["edit", "--source", SOURCE, "--target", TARGET, "--model", str(model), "--steps", "2", "--quiet"]


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("self-replace=0.2:1.0:5", Axis("self_replace", (0.2, 0.4, 0.6, 0.8, 1.0))),
        ("self_replace=0:1:2", Axis("self_replace", (0.0, 1.0))),
        ("seed=1:7:3", Axis("seed", (1, 4, 7))),
        ("method=fpe, masactrl", Axis("method", ("fpe", "masactrl"))),
        ("strength=0.5,1", Axis("strength", (0.5, 1))),
        ("guidance=7", Axis("guidance", (7.0,))),
        ("both_halves=true,false,null", Axis("both_halves", (True, False, None))),
    ],
)
def test_axes(text, axis):
    assert parsed_axis(text) == axis


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("self-replace", "expected NAME=START:STOP:COUNT"),
        ("=1,2", "expected NAME="),
        ("seed=0:1:3", "seed goes over whole numbers"),
        ("steps=a,b", "steps goes over whole numbers"),
        ("guidance=1:2:1", "expected two numbers and how many values"),
        ("guidance=a:2:3", "expected two numbers"),
        ("size=64,128", "a sweep does not go over size"),
    ],
)
def test_axes_that_are_none(text, reason):
    with pytest.raises(InputError, match=reason):
        parsed_axis(text)


def test_two_axes_on_the_command_line(model, tmp_path, capsys, monkeypatch):
    loaded = []
    load = sweeps.load_pipeline
    monkeypatch.setattr(sweeps, "load_pipeline", lambda *a, **k: loaded.append(1) or load(*a, **k))
    arguments = edit_arguments(model)
    arguments += ["--sweep", "self-replace=0:1:2", "--images", "2", "-o", str(tmp_path), "--json"]
    assert cli.main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["axes"] == {"self_replace": [0.0, 1.0], "seed": [5, 6]} and loaded == [1]
    assert said["files"][:2] == [str(tmp_path / f"sweep-{n}.png") for n in (1, 2)]
    names = {f"self-replace={end},seed={seed}" for end in ("0", "1") for seed in (5, 6)}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == names
    for name in names:
        settings, record = runs.read_record(tmp_path / name / "run.json")
        assert f"self-replace={settings.self_replace[1]:g},seed={settings.seed}" == name and not settings.control
        assert set(record["images"]) == {"source.png", "target-1.png", "target-2.png"}
    sheet = Image.open(tmp_path / "sweep-1.png")
    assert sheet.width > 2 * 128 and sheet.height > 2 * 128


@pytest.mark.slow
def test_true_and_false_are_what_an_option_takes_them_for(one, tmp_path):
    one = [*one, "--method", "style-aligned"]
    assert cli.main([*one, "--sweep", "normalise=false,true", "-o", str(tmp_path / "all")]) == 0
    assert cli.main([*one, "--option", "normalise=false", "--no-control", "-o", str(tmp_path / "alone")]) == 0
    names = ("all/normalise=false", "all/normalise=true", "alone")
    first, second, alone = (Image.open(tmp_path / name / "target-1.png") for name in names)
    assert distance(first, alone).levels <= 1 < distance(first, second).levels


@pytest.mark.slow
def test_values_that_are_paths_or_written_alike_stay_in_the_folder(one, tmp_path):
    (tmp_path / "masks").mkdir()
    for name, left in (("a", 0), ("b", 32)):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (left, 0, left + 32, 64))
        mask.save(tmp_path / "masks" / f"{name}.png")
    above = "../" * len(tmp_path.parts) + str(tmp_path / "masks" / "b.png").lstrip("/")
    values = f"{tmp_path / 'masks' / 'a.png'},{above}"
    output = tmp_path / "some" / "where" / "out"
    sweep = ["--sweep", f"mask={values}", "--sweep", "guidance=7.00000001,7.00000002"]
    assert cli.main([*one, *sweep, "-o", str(output)]) == 0
    records = list(tmp_path.rglob("run.json"))
    assert len(records) == 4 and {path.parent.parent for path in records} == {output}
    assert len({json.dumps(json.loads(path.read_text())["settings"]) for path in records}) == 4


@pytest.mark.slow
def test_a_run_of_a_sweep_is_the_run_alone(one, tmp_path):
    assert cli.main([*one, "--sweep", "self-replace=0.5,1", "-o", str(tmp_path / "swept")]) == 0
    assert cli.main([*one, "--self-replace", "0.5", "--no-control", "-o", str(tmp_path / "alone")]) == 0
    swept, alone = (Image.open(tmp_path / name / "target-1.png") for name in ("swept/self-replace=0.5", "alone"))
    assert distance(swept, alone).levels == 0
    other = Image.open(tmp_path / "swept" / "self-replace=1" / "target-1.png")
    assert distance(swept, other).levels > 0


@pytest.mark.slow
def test_a_photo_is_inverted_once_unless_its_inversion_changes(one, tmp_path, monkeypatch):
    Image.effect_noise((64, 64), 60).save(tmp_path / "photo.png")
    inverted = []
    for module in (sweeps, __import__("fpe_pipeline.runs.making", fromlist=["making"])):
        real = module.invert
        monkeypatch.setattr(module, "invert", lambda *a, real=real: inverted.append(1) or real(*a))
    photo = [*one, "--image", str(tmp_path / "photo.png"), "--inversion", "direct"]
    assert cli.main([*photo, "--sweep", "self-replace=0.5,1", "-o", str(tmp_path / "a")]) == 0
    assert len(inverted) == 1
    assert cli.main([*photo, "--sweep", "guidance=3,7", "-o", str(tmp_path / "b")]) == 0
    assert len(inverted) == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--images", "0"], "--images takes a whole number from 1 on, got 0"),
        (["--images", "9999999999"], "a sheet is of 1000 runs at most, got 9999999999; ask for fewer"),
        (["--sweep", "self-replace=0.4:1:9999999999"], "a sheet is of 1000 runs at most"),
        (["--images", "40", "--sweep", "self-replace=0.4:1:30"], "1000 runs at most, got 1200"),
        (["--images", "2", "--sweep", "seed=1,2"], "sweep over one setting or over two"),
        (["--sweep", "seed=1,2", "--sweep", "steps=1,2", "--sweep", "guidance=1,2"], "over one setting or over two"),
        (["--sweep", "no_such=1,2"], "no_such"),
        (["--sweep", "self-replace=0.5,2"], "got 2"),
        (["--sweep", "method=fpe,fpa"], "fpa"),
    ],
)
def test_refused_before_weights_are_read(one, tmp_path, monkeypatch, capsys, arguments, reason):
    refuse_loading(monkeypatch)
    assert cli.main([*one, *arguments, "-o", str(tmp_path / "out")]) == 2
    assert reason in one_error(capsys)


def test_seeds_of_a_photo_are_refused(one, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    assert cli.main([*one, "--image", str(tmp_path / "photo.png"), "--images", "2"]) == 2
    assert "seeds change nothing" in one_error(capsys)


def test_the_sheet(tmp_path):
    colours = ["red", "green", "blue", "white"]
    images = [Image.new("RGB", (64, 64), colour) for colour in colours]
    sheet = contact_sheet([images[:2], images[2:]], ["a", "b"], ["first", "second"], "a title")
    found = {sheet.getpixel((x, y)) for x in range(sheet.width) for y in range(0, sheet.height, 8)}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= found
    red, blue = (_box(sheet, colour) for colour in ((255, 0, 0), (0, 0, 255)))
    assert red[2] - red[0] == red[3] - red[1] == 128 and red[0] == blue[0] and blue[1] > red[3]
    with pytest.raises(ValueError, match="expected 1 rows of 2 pictures"):
        contact_sheet([images], ["a", "b"], [""])


def _box(sheet, colour):
    mask = Image.new("1", sheet.size)
    mask.putdata([pixel == colour for pixel in sheet.getdata()])
    return mask.getbbox()
