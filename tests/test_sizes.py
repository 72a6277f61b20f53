"""Files and functions that can be read in one go, and those that cannot yet."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "examples", "fpe_kernels", "fpe_pipeline", "tests")
LINES, FUNCTION, PARAMETERS = 400, 80, 12

#: Today's exceptions, each with its size; a smaller one is written down here, a larger one is refused.
LONG_FILES = {
    "tests/support/gluon_emulator.py": 486,
}
#: (lines, parameters).
LARGE_FUNCTIONS = {
    "fpe_kernels/testing/cases.py::make_case": (64, 20),
    "fpe_pipeline/app/edit.py::edit": (106, 27),
    "fpe_pipeline/app/evaluate.py::evaluate": (65, 16),
    "fpe_pipeline/embedded/training/loop.py::fit": (85, 9),
    "fpe_pipeline/inversion/trajectory.py::invert": (86, 9),
    "fpe_pipeline/recordings/replay_run.py::edit": (95, 7),
    "fpe_pipeline/runs/run.py::execute": (97, 5),
    # What `pipe(…)` and `pipe.record(…)` take is public, and documented there.
    "fpe_pipeline/pipeline.py::__call__": (143, 25),
    "fpe_pipeline/recordings/record_run.py::record": (85, 19),
}


def sources() -> Iterator[tuple[str, str]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, lines and parameters of every function that is no kernel; ``self`` is none of the parameters."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        given = node.args
        named = [
            one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if one
        ]
        count = len([name for name in named if name not in ("self", "cls")])
        assert node.end_lineno is not None
        yield node.name, node.end_lineno - node.lineno + 1, count


def test_files():
    found = {name: len(text.splitlines()) for name, text in sources()}
    assert {name: lines for name, lines in found.items() if lines > LINES} == LONG_FILES


def test_functions():
    found = {
        f"{path}::{name}": (lines, count)
        for path, text in sources()
        for name, lines, count in functions(text)
        if lines > FUNCTION or count > PARAMETERS
    }
    assert found == LARGE_FUNCTIONS
