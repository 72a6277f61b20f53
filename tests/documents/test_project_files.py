"""Files that other tools read parse, and say what the repository says."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import fpe_kernels

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
#: What a form may ask by: https://docs.github.com, "Syntax for GitHub's form schema".
ELEMENTS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(GITHUB.rglob("*.yml")), ids=lambda path: path.name)
def test_it_parses(path):
    assert isinstance(read(path), dict)


def test_the_workflow_runs_what_ci_runs_and_reads_only():
    workflow = read(GITHUB / "workflows" / "ci.yml")
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 takes `on` for a truth value
    assert workflow["permissions"] == {"contents": "read"}
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run", "make lint"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_github_asks_of_it(path):
    form = read(path)
    assert {"name", "description", "body"} <= form.keys()
    asked = [element["id"] for element in form["body"]]
    assert len(asked) == len(set(asked)) and any(e.get("validations", {}).get("required") for e in form["body"])
    for element in form["body"]:
        assert element["type"] in ELEMENTS and element["attributes"]["label"]


def test_a_report_of_a_bug_comes_with_what_the_machine_is():
    assert "fpe info" in (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    assert {path.stem for path in FORMS} == {"bug", "feature", "method"}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(("target", "extra"), [("demo", "pipeline"), ("test", "dev")])
def test_each_target_makes_the_environment_that_it_needs(target, extra, tmp_path):
    """A demo installs what edits pictures; tests add theirs, and a demo takes their environment where it is there."""
    asked = ["make", "-n", target, f"VENV={tmp_path / 'venv'}"]
    said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"-e '\.\[(\w+)\]'", said) == [extra]
    (stamp,) = set(re.findall(r"touch (\S+)", said))
    Path(stamp).parent.mkdir(exist_ok=True)
    Path(stamp).touch()
    again = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "install" not in again
    demo = ["make", "-n", "demo", f"VENV={tmp_path / 'venv'}", "OUT_DIR=my pictures"]
    said = subprocess.run(demo, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "install" not in said
    command = next(line for line in said.splitlines() if "fpe demo" in line)
    assert shlex.split(command)[-1] == "my pictures"  # one folder


def test_the_citation_is_of_this_version():
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= citation.keys()
    assert str(citation["version"]) == fpe_kernels.__version__
    assert citation["license"] in (ROOT / "setup.py").read_text(encoding="utf-8")
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
        assert reference["title"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_changelog_begins_with_the_version_that_is_being_made():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert versions[0] == fpe_kernels.__version__
    assert len(set(versions)) == len(versions)
    sections = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_an_environment_takes_nobody_elses_folder(tmp_path):
    """Its folder is emptied before it is made, and removed by `make clean`."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")

    def make(target, venv):
        # A Python that makes no environment, if it comes to that: it empties the folder as venv would.
        python = tmp_path / "python"
        python.write_text('#!/bin/sh\n[ "$1" != -m ] || rm -rf "$4"/*\n')
        python.chmod(0o755)
        command = ["make", "-n", target] if target == "clean" else ["make", target]
        options = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
        return subprocess.run([*command, f"VENV={venv}", f"PYTHON={python}"], **options)

    refused = make("environment", mine)
    assert refused.returncode != 0 and "holds something else than an environment" in refused.stderr
    for target in ("environment", "clean"):
        refused = make(target, f"{mine} too/venv")
        assert refused.returncode != 0 and "VENV is to be one path without spaces" in refused.stderr
    assert f"[ ! -f {mine}/pyvenv.cfg ] || rm -rf {mine}\n" in make("clean", mine).stdout
    assert (mine / "thesis.txt").read_text() == "all of it"
