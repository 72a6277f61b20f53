"""What tests of the fpe command share: the tiny model as a folder, a small edit, and how an error is said."""

import json
from unittest import mock

import pytest

from fpe_pipeline.app.commands import parsed
from fpe_pipeline.quality import command
from fpe_pipeline.runs import run as runs
from tests.support.golden_cases import GOLDEN

SOURCE, TARGET, OTHER = "a photo of a red car", "a photo of a blue car", "a photo of a red boat"
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_model_folder(folder, without=()):
    """The tiny model, with 64 px as its own size; entries of ``without`` are left for the caller to write."""
    tiny = GOLDEN / "models" / "tiny-sd15"
    (folder / "unet").mkdir(parents=True)
    for entry in tiny.iterdir():
        if entry.name not in ("unet", *without):
            (folder / entry.name).symlink_to(entry)
    (folder / "unet" / _WEIGHTS).symlink_to(tiny / "unet" / _WEIGHTS)
    config = json.loads((tiny / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 8}))
    return folder


def edit_arguments(model):
    """Arguments of a small edit with two targets, without the folder."""
    return [
        "edit", "--source", SOURCE, "--target", TARGET, "--target", OTHER, "--model", str(model), "--steps", "2",
        "--seed", "5", "--self-replace", "0,0.9", "--quiet",
    ]  # fmt: skip


def evaluation(*arguments):
    """What `fpe evaluate` with these arguments asks for; errors are raised."""
    with mock.patch.object(command, "run", return_value=0) as run:
        assert parsed(["evaluate", *map(str, arguments)])() == 0
    return run.call_args.args[0]


def refuse_loading(monkeypatch):
    """Fail the test where weights are loaded."""
    monkeypatch.setattr(runs, "load_pipeline", lambda *a, **k: pytest.fail("weights were loaded before the checks"))


def one_error(capsys):
    """The one line on stderr; nothing may stand on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fpe: error: ")
    assert err.count("\n") == 1
    return err
