"""How long a first picture takes: what was measured, and that it is measured as it says."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import first_picture
from benchmarks.rows import read

COMMITTED = Path(first_picture.__file__).parent / "results" / "cpu-first-picture.json"


def by_provider(rows, case):
    return {row.provider: row.samples_ms for row in rows if row.case == case}


@pytest.fixture(scope="module")
def committed():
    if not COMMITTED.exists():
        pytest.skip(f"not measured yet: python -m benchmarks.first_picture page --output {COMMITTED.name}")
    return read(COMMITTED)


def test_the_page_costs_no_more_than_its_imports_the_edit_and_three_seconds(committed):
    rows = by_provider(committed, "embedded/page")
    rounds = list(zip(rows["page"], rows["imports"], rows["api"], strict=True))
    assert len(rounds) >= 3
    waits = sorted(page - imports - edit for page, imports, edit in rounds)
    assert waits[len(waits) // 2] <= 3000, waits


@pytest.mark.slow
def test_the_edit_that_it_is_compared_with_is_the_pages():
    fast = first_picture._EDIT.replace('"steps": 25', '"steps": 1')
    assert fast != first_picture._EDIT
    recipe = (Path(first_picture.__file__).parents[1] / "fpe_pipeline/studio/recipe.py").read_text(encoding="utf-8")
    assert "limits.steps, value=25" in recipe and "defaults(EXAMPLES[0][1:])" in recipe
    assert float(first_picture._python(fast).split()[-1]) > 0


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(RuntimeError, match="planted"):
        first_picture._python("raise SystemExit('planted')")


@pytest.mark.slow
def test_a_round_of_the_page():
    pytest.importorskip("playwright")
    made = subprocess.run(
        [sys.executable, "-m", "benchmarks.first_picture", "page", "--rounds", "1"], capture_output=True, text=True
    )
    if "Executable doesn't exist" in made.stderr:
        pytest.skip("no Chromium: `apt install chromium`")
    assert made.returncode == 0, made.stderr
    assert [line.split()[1] for line in made.stdout.splitlines()] == ["imports", "api", "page"]
