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
    return read(COMMITTED)


def median(rows, provider):
    samples = sorted(rows[provider])
    return samples[len(samples) // 2]


def test_the_page_costs_no_more_than_its_imports_the_edit_and_three_seconds(committed):
    rows = by_provider(committed, "embedded/page")
    assert len(rows["page"]) == len(rows["imports"]) == len(rows["api"]) >= 3, "of the same rounds"
    page, imports, edit = (median(rows, name) for name in ("page", "imports", "api"))
    assert page <= imports + edit + 3000, f"{page:.0f} ms, against {imports:.0f} + {edit:.0f} + 3000"


def test_from_clone_to_a_first_picture(committed):
    rows = by_provider(committed, "embedded/clone")
    assert {"clone", "download", "beyond", "demo", "ours"} <= rows.keys()
    assert max(rows["beyond"]) <= 180_000 and max(rows["ours"]) <= 30_000, "three minutes beyond the download"


def test_a_command_is_timed_until_its_first_edited_picture(tmp_path):
    code = "import pathlib, sys, time; at = pathlib.Path(sys.argv[1], 'colour'); at.mkdir(parents=True); "
    code += "(at / 'target-1.png').touch(); time.sleep(1)"
    first, whole = first_picture._until_a_picture([sys.executable, "-c", code, str(tmp_path / "out")], tmp_path / "out")
    assert first < whole - 0.5
    with pytest.raises(RuntimeError, match="target-1"):
        first_picture._until_a_picture([sys.executable, "-c", ""], tmp_path / "none")


@pytest.mark.slow
def test_the_edit_that_it_is_compared_with_is_the_pages():
    fast = first_picture._EDIT.replace("first_fields()", 'first_fields() | {"steps": 1}')
    assert fast != first_picture._EDIT
    recipe = (Path(first_picture.__file__).parents[1] / "fpe_pipeline/studio/recipe.py").read_text(encoding="utf-8")
    assert "start = first_fields(models[0])" in recipe
    assert float(first_picture._python(fast).split()[-1]) > 0


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(RuntimeError, match="planted"):
        first_picture._python("raise SystemExit('planted')")


@pytest.mark.slow
def test_a_unet_is_loaded_without_the_pipelines_of_transformers():
    """Whose import takes a second."""
    code = "import sys; from fpe_pipeline import FreePromptPipeline; import fpe_pipeline.studio.desk; "
    code += 'FreePromptPipeline.from_pretrained("embedded"); print([n for n in sys.modules if "pipelines.flux" in n])'
    assert first_picture._python(code).split() == ["[]"]


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
