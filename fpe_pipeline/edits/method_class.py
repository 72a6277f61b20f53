"""A method that somebody else wrote: ``package.module:Class``, imported because it was named so."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..texts import did_you_mean
from .base import Edit
from .method import Method

__all__ = ["changes_since", "class_method", "names_a_class", "origin_of"]


def names_a_class(name: str) -> bool:
    """Whether a method's name asks for an import; no other name imports anything."""
    return ":" in name


def class_method(name: str) -> Method:
    """The method of an edit's class.

    Args:
        name: ``package.module:Class``, of a module in the current directory or on ``sys.path``. Importing it runs it.

    Raises:
        ValueError: another spelling, no such module, one that fails to be imported, no such class in it, or one that
            is no edit that can be made.
    """
    module_name, _, class_name = name.partition(":")
    if not class_name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"expected a method as package.module:Class, such as my_edit:MyEdit, got {name!r}")
    module = _imported(module_name)
    found = getattr(module, class_name, None)
    if found is None:
        there = [n for n, value in vars(module).items() if _is_edit(value) and value.__module__ == module.__name__]
        has = f"its edits are {', '.join(there)}" if there else "it has no edit"
        raise ValueError(f"{module_name} has no class {class_name}; {did_you_mean([class_name], there)}{has}")
    if not _is_edit(found):
        what = f"the class {class_name}" if isinstance(found, type) else f"an object of {type(found).__name__}"
        raise ValueError(
            f"{name} is {what}, which is no Edit: write class {class_name}(fpe_pipeline.Edit), with a method products"
        )
    _check_can_be_made(name, found)
    summary = (inspect.cleandoc(found.__doc__ or "").splitlines() or [""])[0].rstrip(".")
    generated = summary.startswith(f"{class_name}(")  # what a dataclass writes where nobody else did
    return Method(name, class_name, summary.replace("{", "{{").replace("}", "}}") if not generated else name, found)


def _is_edit(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Edit)


def _check_can_be_made(name: str, kind: type[Edit]) -> None:
    missing = sorted(kind.__abstractmethods__)
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}: an Edit says there what the rows of a layer become")
    hints = vars(kind).get("__annotations__", {})
    declared = [field for field, hint in hints.items() if "ClassVar" not in str(hint)]
    if declared and "__dataclass_fields__" not in vars(kind) and "__init__" not in vars(kind):
        raise ValueError(
            f"{name} declares {', '.join(declared)} and is no dataclass, so that nothing sets them: write "
            "@dataclass(frozen=True) above the class"
        )


def _imported(name: str) -> ModuleType:
    with _current_directory():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                raise ValueError(
                    f"there is no module {error.name} in {os.getcwd()} or on sys.path: run the command where it is, or "
                    "put its folder into PYTHONPATH"
                ) from error
            raise ValueError(f"importing {name} failed: {error}") from error
        except Exception as error:
            raise ValueError(f"importing {name} failed: {type(error).__name__}: {error}") from error


@contextmanager
def _current_directory() -> Iterator[None]:
    """Let modules be found in the current directory first, as ``python -m`` does and an installed command does not."""
    here = os.getcwd()
    if {"", here} & set(sys.path[:1]):
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def origin_of(name: str) -> dict[str, Any]:
    """Of a method that is a class, what a record says of it: the class, its module's file and that file's SHA-256.

    What the module imports itself is not part of it.
    """
    module = sys.modules[class_method(name).edit.__module__]
    file = getattr(module, "__file__", None)
    digest = None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return {"class": name, "file": None if file is None else str(Path(file).resolve()), "sha256": digest}


def changes_since(recorded: dict[str, Any]) -> str:
    """What has become of the class of a record, in words; empty where it is what it was."""
    name, was = str(recorded.get("class")), f"{recorded.get('file')}, SHA-256 {str(recorded.get('sha256'))[:12]}…"
    try:
        now = origin_of(name)
    except ValueError as error:
        return f"the record was made by {name} of {was}, which cannot be had: {error}"
    if now["sha256"] == recorded.get("sha256"):
        return ""
    return (
        f"the record was made by {name} of {was}, and {now['file']} is now another file, SHA-256 "
        f"{str(now['sha256'])[:12]}…: put that one back, or pass --method {name} to use this one all the same"
    )
