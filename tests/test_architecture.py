"""docs/architecture.md draws what there is, and every path in it is there."""

import re
import subprocess

import pytest

from tests.support import arrows

TEXT = (arrows.ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
QUESTIONS = [line for line in TEXT.splitlines() if line.startswith("| ") and "tests/" in line]


def test_the_arrows_are_those_of_today():
    drawn = arrows.imports()
    shown = re.findall(r"<!-- arrows -->\n```text\n(.*?)\n```", TEXT, re.DOTALL)
    expected = [arrows.drawing(drawn, package).partition("\n")[2] for package in ("fpe_pipeline", "fpe_kernels")]
    assert shown == expected, "python -m tests.support.arrows"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:fpe_\w+|tests|docs|benchmarks)/[\w./]*)`", TEXT))))
def test_every_path_is_there(path):
    assert (arrows.ROOT / path).exists()


def test_every_question_names_a_room_and_a_test():
    assert len(QUESTIONS) == 12
    for line in QUESTIONS:
        question, room, test = (cell.strip() for cell in line.strip("|").split("|"))
        assert question.endswith("?") and re.search(r"`fpe_\w+/", room)
        (path,) = re.findall(r"`(tests/[\w/]+\.py)`", test)
        text = (arrows.ROOT / path).read_text(encoding="utf-8")
        assert "def test_" in text and "fpe_" in text


#: What lies at the top beside files that are told by their names: whatever else is there was left by a run.
FOLDERS = {".ci", ".github", "benchmarks", "docs", "examples", "fpe_kernels", "fpe_pipeline"}
FOLDERS |= {"integrations", "notebooks", "tests"}
FILES = {
    ".gitignore",
    ".pre-commit-config.yaml",
    "LICENSE",
    "Makefile",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
}
FILES |= {f"{name}.md" for name in ("CHANGELOG", "CODE_OF_CONDUCT", "CONTRIBUTING", "README", "SECURITY")}
FILES |= {"CITATION.cff"}


@pytest.mark.skipif(not (arrows.ROOT / ".git").exists(), reason="an archive has no list of what is kept")
def test_nothing_else_is_kept_at_the_top():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=arrows.ROOT, check=True, capture_output=True, text=True)
    kept = [path for path in listing.stdout.split("\0") if path and (arrows.ROOT / path).exists()]
    assert {path.partition("/")[0] for path in kept if "/" in path} == FOLDERS
    assert {path for path in kept if "/" not in path} == FILES


def test_every_room_is_in_the_tree():
    tree = TEXT.partition("```text\n")[2].partition("```")[0]
    for name in arrows.rooms(arrows.imports()):
        package, _, room = name.partition(".")
        if package == "fpe_pipeline" and room not in ("", "ground"):
            assert re.search(rf"^\s*{room.rpartition('.')[2]}\b", tree, re.MULTILINE), room
