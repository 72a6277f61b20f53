"""Files and functions that can be read in one go."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "examples", "fpe_kernels", "fpe_pipeline", "integrations", "notebooks", "tests")
LINES, FUNCTION, PARAMETERS = 400, 80, 12

#: Modules of the command line; the function of the module's own name is the command.
COMMANDS = {f"fpe_pipeline/app/{name}.py" for name in ("batch", "edit", "evaluate", "heatmap", "invert")}

#: Functions whose length or parameters are somebody else's choice.
EXEMPT = {
    "jit": "a kernel, which Triton gets whole",
    "command": "what a command takes: typer reads the options off the function, which hands them on at once",
    "call": "what diffusers' own pipelines take in their `__call__`, with an edit's beside it",
}


def sources() -> Iterator[tuple[str, str]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def exempt(path: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """The reason, of `EXEMPT`, why a function may be large."""
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    if "jit" in decorators:
        return "jit"
    if path in COMMANDS and node.name == path.rpartition("/")[2].removesuffix(".py"):
        return "command"
    return "call" if (path, node.name) == ("fpe_pipeline/pipelines/unet_editing.py", "__call__") else None


@functools.cache
def functions(path: str, text: str) -> tuple[tuple[str, int, int, str | None], ...]:
    """Name, lines, parameters and exemption of every function; ``self`` is none of the parameters.

    Two tests ask for them; the syntax itself is not kept, of which garbage collections would take longer than all else.
    """
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = node.args
        named = [
            one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if one
        ]
        count = len([name for name in named if name not in ("self", "cls")])
        assert node.end_lineno is not None
        found.append((node.name, node.end_lineno - node.lineno + 1, count, exempt(path, node)))
    return tuple(found)


def too_long(files: Iterable[tuple[str, str]]) -> list[str]:
    """What cannot be read in one go, in words."""
    found = []
    for path, text in files:
        lines = len(text.splitlines())
        if lines > LINES:
            found.append(f"{path}: {lines} lines")
        found += [
            f"{path}::{name}: {length} lines, {count} parameters"
            for name, length, count, exemption in functions(path, text)
            if not exemption and (length > FUNCTION or count > PARAMETERS)
        ]
    return found


def test_sizes():
    assert too_long(sources()) == []


def test_every_exemption_is_needed():
    used = {exemption for path, text in sources() for *_, exemption in functions(path, text) if exemption}
    assert used == EXEMPT.keys()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1\n" * (LINES + 1), f"a.py: {LINES + 1} lines"),
        ("def f():\n" + "    x = 1\n" * FUNCTION, f"a.py::f: {FUNCTION + 1} lines, 0 parameters"),
        (
            f"def __call__(self, {', '.join(f'p{i}' for i in range(13))}): ...\n",
            "a.py::__call__: 1 lines, 13 parameters",
        ),
    ],
    ids=["a long file", "a long function", "many parameters"],
)
def test_what_is_planted_is_seen(text, found):
    assert too_long([("a.py", text)]) == [found]
