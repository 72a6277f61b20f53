"""Messages of errors say what came in one word, and comments are sentences, not banners."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Other words for what "got" says.
OTHER_VERBS = re.compile(r"\b(received|was given|were given)\b")
BANNER = re.compile(r"^\s*# ?[-=#*]{2,}")


def sources(*folders: str) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def raised(text: str) -> Iterator[str]:
    """The text of every error that is raised."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def test_errors_say_what_they_got():
    found = [
        f"{path}: {message}"
        for path, text in sources("fpe_kernels", "fpe_pipeline", "benchmarks")
        for message in raised(text)
        if OTHER_VERBS.search(message)
    ]
    assert found == []


def test_no_banners():
    found = [
        f"{path}:{number}"
        for path, text in sources("fpe_kernels", "fpe_pipeline", "benchmarks", "tests", "docs", "examples")
        for number, line in enumerate(text.splitlines(), start=1)
        if BANNER.match(line)
    ]
    assert found == []


def test_what_is_planted_is_seen():
    assert [text for text in raised('raise ValueError(f"{name} received {x!r}")') if OTHER_VERBS.search(text)]
    assert BANNER.match("    # -- products ------") and BANNER.match("# =====") and not BANNER.match("# -inf is masked")
