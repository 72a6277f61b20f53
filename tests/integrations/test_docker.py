"""The Dockerfiles, as far as can be said without Docker: every path, extra and command that they name is there."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fpe_pipeline.app.commands import parsed

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "integrations" / "docker").glob("*.Dockerfile"))
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD"}


def instructions(path):
    """(instruction, arguments) of each; comments are left out and continued lines joined."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


@pytest.fixture(params=FILES, ids=lambda path: path.stem, name="read")
def _read(request):
    return instructions(request.param)


def said(read, name):
    return [arguments for instruction, arguments in read if instruction == name]


def test_both_are_there():
    assert {path.stem for path in FILES} == {"cpu", "cuda"}


def test_instructions(read):
    assert {instruction for instruction, _ in read} <= KNOWN
    assert read[0][0] == "FROM" and re.fullmatch(r"[\w./-]+:[\w.-]+", read[0][1]), "a base without a version moves"


def test_what_is_copied_is_there_and_is_enough_to_install(read, tmp_path):
    for arguments in said(read, "COPY"):
        *sources, target = shlex.split(arguments)
        for source in sources:
            assert (ROOT / source).exists(), source
            to = tmp_path / (source if target == "./" else target)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
            else:
                shutil.copyfile(ROOT / source, to)
    found = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "--name"], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout.strip().endswith("fpe-kernels"), found.stderr
    assert (tmp_path / "constraints.txt").exists()


def test_extras_are_in_setup(read):
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = [extra for arguments in said(read, "RUN") for extra in re.findall(r"'\.\[(\w+)\]'", arguments)]
    assert extras == ["app"]
    assert all(f'"{extra}": ' in setup for extra in extras)


def test_what_it_runs_is_a_command_of_ours_and_not_as_root(read):
    assert json.loads(said(read, "ENTRYPOINT")[0]) == ["fpe"]
    arguments = json.loads(said(read, "CMD")[0])
    parsed(arguments)
    assert arguments[arguments.index("--port") + 1] == said(read, "EXPOSE")[0]
    assert arguments[arguments.index("-o") + 1] == said(read, "VOLUME")[0]
    (user,) = said(read, "USER")
    assert user != "root" and any(f"useradd --create-home {user} " in run for run in said(read, "RUN"))
    last = [instruction for instruction, _ in read]
    assert last.index("USER") > max(n for n, name in enumerate(last) if name == "RUN")


def test_a_page_in_a_container_is_told_to_listen_beyond_itself(read):
    arguments = json.loads(said(read, "CMD")[0])
    assert arguments[arguments.index("--host") + 1] == "0.0.0.0"


def test_a_folder_that_is_lent_to_a_container_can_be_written_to():
    """Docker makes a missing one as root's, and the container's user is another than the one who runs it."""
    page = (ROOT / "integrations" / "README.md").read_text(encoding="utf-8")
    lines = [line[2:] for line in page.splitlines() if line.startswith("$ ")]
    lent = [line for line in lines if line.startswith("docker run") and " -v " in line]
    assert lent and all('--user "$(id -u):$(id -g)"' in line for line in lent)
    assert lines.index("mkdir -p out") < lines.index(lent[0])
    assert all('-v "$PWD/out:/out"' in line for line in lent)
