"""What a user meets first: the command without arguments, missing packages, and nothing on stderr but what is meant."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

import fpe_kernels
import fpe_pipeline
from fpe_pipeline import extras
from fpe_pipeline.app import cli
from tests.support.tiny_cli import one_error

ROOT = Path(__file__).parents[3]
SHORT = ["edit", "--source", "a photo of a red car", "--target", "a photo of a blue car", "--steps", "2", "--quiet"]


def fpe(arguments, without=()):
    """The finished process of a command that runs without some modules."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({list(without)})); from fpe_pipeline import cli; "
        f"sys.exit(cli.main({[str(each) for each in arguments]}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_alone_it_prints_help(capsys):
    assert cli.main([]) == 0
    out, err = capsys.readouterr()
    assert out.strip().startswith("Usage: fpe") and not err
    assert all(command in out for command in ("demo", "edit", "evaluate", "info"))


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fpe {fpe_kernels.__version__}\n"
    assert fpe_pipeline.__version__ == fpe_kernels.__version__


@pytest.mark.parametrize("command", cli.NEED_PICTURES)
def test_missing_packages_name_their_extra(command, monkeypatch, capsys):
    monkeypatch.setattr(extras, "missing", lambda modules: ["PIL", "diffusers"])
    assert cli.main([command, "--whatever"]) == 2
    error = one_error(capsys)
    assert "PIL, diffusers cannot be imported" in error and "pip install '.[pipeline]'" in error


def test_kernels_alone():
    """As `pip install .` leaves it."""
    made = fpe(["demo"], without=extras.PIPELINE)
    assert made.returncode == 2 and made.stdout == ""
    assert "the extra 'pipeline'" in made.stderr.splitlines()[-1] and "Traceback" not in made.stderr
    code = f"import sys; sys.modules.update(dict.fromkeys({list(extras.PIPELINE)})); import fpe_pipeline.edits"
    code = code.replace("import fpe_pipeline.edits", "from fpe_pipeline import FreePromptPipeline")
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in made.stderr and "pip install '.[pipeline]'" in made.stderr.splitlines()[-1]


@pytest.mark.slow
def test_libraries_keep_quiet(tmp_path):
    """Also where the packages are missing that they would advise to install."""
    made = fpe([*SHORT, "-o", tmp_path], without=("torchvision", "accelerate", "peft"))
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""


@pytest.mark.slow
def test_a_long_prompt_is_warned_of_in_one_line(tmp_path):
    long = "a photo of a red car on the beach in the snow " * 12
    made = fpe([*SHORT, "--source", long, "--target", f"{long} a balloon", "--steps", "2", "-o", tmp_path])
    assert made.returncode == 0, made.stderr
    assert made.stderr.count("\n") == 1
    assert made.stderr.startswith("fpe: the model reads the first 22 tokens of a prompt and no more: source ")
    assert "target 2 " in made.stderr and "target 1 " not in made.stderr


def test_completion_offers_the_public_names():
    assert sorted(dir(fpe_pipeline)) == sorted([*fpe_pipeline.__all__, "__version__"])
    assert all(getattr(fpe_pipeline, name) is not None for name in dir(fpe_pipeline))


@pytest.mark.parametrize("url", ["", "https://example.org/owner/fpe-kernels"])
def test_what_an_index_is_told(url, monkeypatch):
    told = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    monkeypatch.setenv("FPE_PROJECT_URL", url)
    runpy.run_path(str(ROOT / "setup.py"))
    assert told["version"] == fpe_kernels.__version__ and told["license"] and told["description"] and told["keywords"]
    kept = {name.partition(".")[0] for name in told["packages"]}
    assert kept == {"fpe_kernels", "fpe_pipeline"} and "fpe_pipeline.quality" in told["packages"]
    text = told["long_description"]
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert "## Measured" in text and all(link.startswith(("https://", "#")) for link in links)
    assert ("![" in text) == bool(url)
    for link in (link for link in links if not link.startswith("#")):
        path = (
            link.partition("#")[0]
            .removeprefix(f"{url}/raw/v{told['version']}/")
            .removeprefix(f"{url}/blob/v{told['version']}/")
        )
        assert not url or (ROOT / path).exists(), link
