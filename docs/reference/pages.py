"""Pages of the reference, written from the docstrings of the public names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import fpe_kernels
import fpe_pipeline

from .docstrings import SECTIONS, Docstring, parsed

__all__ = ["PACKAGES", "Member", "index", "members", "page", "pages", "public"]

PACKAGES = (fpe_kernels, fpe_pipeline)
OURS = tuple(package.__name__ for package in PACKAGES)
#: Longest line of a signature before its parameters take one each.
WIDTH = 100


@dataclass(frozen=True)
class Member:
    """A public method or property of a class.

    Args:
        name: as it is called.
        kind: "method", "class method" or "property".
        function: what runs.
        text: its docstring, an overridden one's where it has none.
    """

    name: str
    kind: str
    function: FunctionType
    text: str


def public() -> dict[str, list[tuple[str, Any]]]:
    """By package, its public names with what they name."""
    return {package.__name__: _named(package) for package in PACKAGES}


def _named(package: ModuleType) -> list[tuple[str, Any]]:
    return [(name, getattr(package, name)) for name in sorted(package.__all__, key=str.lower)]


def members(kind: type) -> Iterator[Member]:
    """Public methods and properties that this package defines for a class, its bases' first named by the class; what a
    call of its instances does is among them where it says so itself."""
    names = {
        name: base
        for base in reversed(kind.__mro__)
        if base.__module__.partition(".")[0] in OURS
        for name, found in vars(base).items()
        if not name.startswith("_") or (name == "__call__" and found.__doc__)
    }
    for name, base in sorted(names.items()):
        found = vars(base)[name]
        if isinstance(found, property):
            function, what = found.fget, "property"
        elif isinstance(found, classmethod | staticmethod):
            function, what = found.__func__, "class method"
        else:
            function, what = getattr(found, "func", found), "property" if hasattr(found, "func") else "method"
        if isinstance(function, FunctionType):
            text = inspect.getdoc(getattr(kind, name)) if what != "property" else inspect.getdoc(found)
            yield Member(name, what, function, text or "")


def signature(name: str, function: Any, *, drop_first: bool = False) -> str:
    """``name(…)`` with defaults and without annotations, a parameter a line where that is long."""
    try:
        listed = list(inspect.signature(function).parameters.values())[int(drop_first) :]
    except ValueError:
        return name
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in listed]
    # The addresses of objects differ from run to run, and long defaults say less than their names.
    shown = re.sub(r"<(?:function|class|object)[^>]*>", "…", str(inspect.Signature(plain)))
    if len(name) + len(shown) <= WIDTH or not plain:
        return f"{name}{shown}"
    parts = re.split(r", (?![^(\[]*[)\]])", shown[1:-1])
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + ")"


def page(package: ModuleType) -> str:
    """A package's page."""
    lines = [f"# `{package.__name__}`", "", inspect.getdoc(package) or "", ""]
    lines += ["Written from the docstrings by `python -m docs.reference`.", ""]
    for name, found in _named(package):
        lines += [f"## `{name}`", "", *_described(name, found, parsed(inspect.getdoc(found) or ""))]
        if not inspect.isclass(found):
            continue
        for member in members(found):
            call = member.name
            if member.kind != "property":
                call = signature(member.name, member.function, drop_first=True)
            lines += [f"### `{name}.{member.name}`", "", f"*{member.kind}*", ""]
            lines += ["```text", call, "```", ""] if member.kind != "property" else []
            lines += _words(parsed(member.text))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _described(name: str, found: Any, said: Docstring) -> Iterator[str]:
    if callable(found):
        yield from ("```text", signature(name, found), "```", "")
    yield from _words(said)


def _words(said: Docstring) -> Iterator[str]:
    yield from (_markdown(said.words), "")
    for section in SECTIONS:
        if section not in said.sections:
            continue
        yield from (f"**{section}**", "")
        entries = said.entries(section) if section in ("Args", "Raises") else []
        if entries:
            yield from (f"- `{names}`: {_inline(words)}" for names, words in entries)
        else:
            yield _inline(" ".join(said.sections[section].split()))
        yield ""


def _inline(words: str) -> str:
    """Words without the roles and double backticks of reStructuredText."""
    words = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", words)
    return re.sub(r"``([^`]+)``", r"`\1`", words)


def _markdown(words: str) -> str:
    """Paragraphs as they are; tables, indented blocks and examples as text."""
    blocks = []
    for block in re.split(r"\n\s*\n", words):
        rows = block.splitlines()
        if rows and (rows[0].startswith(("=", ">>>", "    "))):
            blocks.append("```text\n" + inspect.cleandoc(f"\n{block}") + "\n```")
        else:
            text = _inline(re.sub(r"::$", ":", block))
            blocks.append(text)
    # What was one block before an empty line was taken for two.
    return re.sub(r"\n```\n\n```text\n", "\n\n", "\n\n".join(blocks))


def index() -> str:
    """The first page: every name with its first sentence."""
    lines = ["# Reference", "", "Written from the docstrings by `python -m docs.reference`.", ""]
    for package, named in public().items():
        lines += [f"## [`{package}`]({package}.md)", "", "| name | what it is |", "|---|---|"]
        for name, found in named:
            first = (inspect.getdoc(found) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
            lines.append(f"| [`{name}`]({package}.md#{name.lower()}) | {_inline(first).rstrip(':')} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[str, str]:
    """By file name, everything that ``python -m docs.reference`` writes."""
    return {"README.md": index()} | {f"{package.__name__}.md": page(package) for package in PACKAGES}
