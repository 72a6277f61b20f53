"""`--json` puts one object on standard output, whatever the command, and whatever goes wrong."""

import json
import sys

import pytest
from typer.main import get_command

from fpe_pipeline.app import cli, demo
from fpe_pipeline.app.commands import app
from tests.support.tiny_cli import edit_arguments, tiny_model_folder


@pytest.mark.parametrize("name", get_command(app).commands)
def test_every_command_has_the_three(name):
    known = {flag for option in get_command(app).commands[name].params for flag in option.opts}
    assert {"--json", "--quiet", "--traceback"} <= known


def said(capsys):
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_an_edit(tmp_path, capsys):
    model = tiny_model_folder(tmp_path / "tiny")
    assert cli.main([*edit_arguments(model), "--no-control", "-o", str(tmp_path / "out"), "--json"]) == 0
    found, _ = said(capsys)
    assert found["files"][0] == str(tmp_path / "out" / "comparison.png")
    assert found["record"]["settings"]["seed"] == 5


def test_closed_streams_cost_no_exit_code_and_no_output(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["edit", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["edit", "--json"]) == 2


def test_a_refusal(capsys):
    assert cli.main(["edit", "--json"]) == 2
    found, err = said(capsys)
    assert found["exit_code"] == 2 and found["error"].startswith("expected --source and --target")
    assert err == f"fpe: error: {found['error']}\n"
    assert cli.main(["edit", "--json", "--no-such"]) == 2
    found, err = said(capsys)
    assert "there is no option --no-such" in found["error"]


def test_what_there_is(capsys):
    assert cli.main(["info", "--json"]) == 0
    found, _ = said(capsys)
    assert found["backends"]["torch"] == "available" and "fpe" in found["methods"] and found["versions"]["torch"]
    steps = {title: own["steps"] for title, own in found["families"].items()}
    assert steps.items() >= {"SDXL": 50, "FLUX.1": 28, "PixArt": 20}.items()
    assert found["families"]["FLUX.2, distilled"]["guidance"] == 1 < found["families"]["FLUX.2"]["guidance"]
    assert cli.main(["info", "--method", "masactrl", "--json"]) == 0
    assert "start_step" in said(capsys)[0]["text"]


def test_a_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda output, **options: [output / "demo.png"])
    assert cli.main(["demo", "-o", str(tmp_path), "--json", "--quiet"]) == 0
    assert said(capsys) == ({"files": [str(tmp_path / "demo.png")]}, "")


def test_completion_of_a_shell(capsys, monkeypatch):
    """What bash asks while `fpe bat` is typed."""
    for name, value in {"_FPE_COMPLETE": "complete_bash", "COMP_WORDS": "fpe bat", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main([]) == 0
    assert capsys.readouterr().out.split() == ["batch"]
