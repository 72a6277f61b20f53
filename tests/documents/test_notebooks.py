"""The notebooks run from top to bottom without a hub, and hold what they showed.

In the short form their cells run in this process with few steps; in the long one each runs in a kernel of its own.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

pytest.importorskip("nbclient", reason="notebooks are run where Jupyter's own packages are installed")

import nbformat

from fpe_pipeline import FreePromptPipeline
from notebooks.__main__ import FOLDER, executed, main
from tests.support.golden_cases import load_pipeline
from tests.support.tiny_pipelines import tiny_sdxl_pipeline

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = {"edit_fake", "edit_real", "null_text_w_FPE", "FPE_in_p2p", "attention_maps", "kernels"}
MOST_BYTES = 900_000
#: What the notebooks' only line about steps is replaced by.
FEW = "STEPS = 2"


@pytest.fixture
def pipe():
    return load_pipeline()


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(path) -> Iterator[str]:
    return (cell.source for cell in read(path).cells if cell.cell_type == "code")


def test_a_name_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["notebooks", "edit_fak"])
    assert main() == 2 and "'edit_fake'" in capsys.readouterr().err


def test_there_are_these():
    assert {path.stem for path in NOTEBOOKS} == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestAsSaved:
    def test_a_cell_that_is_run_again_finds_what_it_found(self, path):
        """Whatever cells were run since: a name that another cell reads is given by one cell alone."""
        bound, read_elsewhere = [], set()
        for code in code_of(path):
            names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
            own = {name.id for name in names if isinstance(name.ctx, ast.Store)}
            bound += own
            read_elsewhere |= {name.id for name in names if isinstance(name.ctx, ast.Load)} - own
        assert not [name for name in read_elsewhere if bound.count(name) > 1]

    def test_it_is_whole_and_was_run_in_order(self, path):
        notebook = read(path)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
        assert sum(bool(cell.outputs) for cell in cells) >= len(cells) - 2
        assert path.stat().st_size < MOST_BYTES

    def test_its_code_is_formatted_as_the_packages(self, path):
        for code in code_of(path):
            ast.parse(code)
            assert all(len(line) <= 120 for line in code.splitlines()), code
        steps = re.findall(r"^STEPS = \d+", "\n".join(code_of(path)), re.MULTILINE)
        assert len(steps) == (path.stem != "kernels")

    def test_it_says_how_other_models_are_loaded(self, path):
        text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
        models = ("T4",) if path.stem == "kernels" else ("Realistic-Vision", "Deliberate", "Anything", "SDXL", "T4")
        assert all(name in text for name in models)


def recipes(path):
    """Blocks of code in a notebook's text."""
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL), text


def test_recipes_for_other_models_run(pipe, monkeypatch):
    """As printed, in few steps, on a tiny model in the place of each folder and file."""
    tiny, xl = FreePromptPipeline.from_pipe(pipe), tiny_sdxl_pipeline(pipe)
    found = {}
    for path in NOTEBOOKS:
        blocks, text = recipes(path)
        assert text.count("```") == 2 * len(blocks), f"{path.name} has a block that nothing runs"
        found |= dict.fromkeys(blocks)
    (recipe,) = found
    asked = []
    for kind, stand_in in ((FreePromptPipeline, tiny), (StableDiffusionXLPipeline, xl)):
        for way in ("from_pretrained", "from_single_file"):

            def loaded(name, *, torch_dtype, way=way, stand_in=stand_in):
                asked.append((way, name))
                return stand_in

            monkeypatch.setattr(kind, way, loaded)
    monkeypatch.setattr(DiffusionPipeline, "to", lambda pipe, device: pipe)  # "cuda"
    scope = {}
    few = recipe.replace("generator=same_noise)", "generator=same_noise, num_inference_steps=3, height=64, width=64)")
    assert few != recipe
    exec(compile(few, "recipes", "exec"), scope)
    assert scope["source"].size == scope["target"].size == (64, 64)
    for name in ("stable-diffusion-v1-5", "Realistic_Vision", "deliberate", "anything", "xl"):
        ways = {way for way, asked_name in asked if name.lower() in asked_name.lower().replace("v1-5-pruned", name)}
        assert ways == {"from_pretrained", "from_single_file"}, name


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem != "FPE_in_p2p")) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_its_cells_run_with_few_steps(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    scope = {"__name__": "__main__"}
    for number, code in enumerate(code_of(path)):
        exec(compile(re.sub(r"^STEPS = \d+", FEW, code, flags=re.MULTILINE), f"{path.name}[{number}]", "exec"), scope)
    assert shown or path.stem == "kernels"
    assert not list(Path(tmp_path).iterdir()), "a notebook leaves files behind"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path):
    before, after = read(path), executed(path)
    for then, now in zip(before.cells, after.cells, strict=True):
        if then.cell_type == "code":
            kinds = [[sorted(out.get("data", {"text": ""})) for out in cell.outputs] for cell in (then, now)]
            assert kinds[0] == kinds[1], then.source
