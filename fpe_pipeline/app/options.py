"""The options of `fpe`: how they are written, which field of a schema each fills in, where it stands in the help."""

from __future__ import annotations

import json
import math
import os.path
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ..runs.option_files import OPTION_FILES
from ..runs.settings import Schema

__all__ = [
    "as_integers",
    "as_layers",
    "as_name_and_value",
    "as_size",
    "as_window",
    "at_home",
    "chosen",
    "field",
    "flag",
    "prose",
]

#: What the help calls paths, and what may be one.
_PLACES = ("DIR", "FILE", "PATH", "WHICH")


def field(schema: type[Schema], name: str, *flags: str, panel: str, note: str = "", **options: Any) -> Any:
    """An option for a field of a schema, with the field's words in the help.

    Args:
        schema, name: of the field.
        flags: the option's names; ``--`` and the field's where none is given.
        panel: the group in which the help shows it.
        note: what is done where it is not given; the field's default unless it has none.
        options: further ones of ``typer.Option``.
    """
    default = schema.model_fields[name].default
    if not note and isinstance(default, int | float | str) and not isinstance(default, bool):
        note = f"default: {default:g}" if isinstance(default, float) else f"default: {default}"
    help_text = schema.about(name) + (f" ({note})" if note else "")
    names = flags or (f"--{name.replace('_', '-')}",)
    options.setdefault("callback", _callback(options.get("metavar", "")))
    return typer.Option(*names, help=_plain(help_text), rich_help_panel=panel, show_default=False, **options)


def flag(*flags: str, panel: str, text: str, metavar: str = "") -> Any:
    """An option that fills in no field."""
    return typer.Option(
        *flags,
        help=_plain(text),
        rich_help_panel=panel,
        show_default=False,
        metavar=metavar,
        callback=_callback(metavar),
    )


def at_home(value: Any) -> Any:
    """A path, or several, with the home folder for ``~``, which shells leave in quotes and after ``--name=``."""
    if isinstance(value, list | tuple):
        return [at_home(each) for each in value]
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value


def _callback(metavar: str) -> Callable[[Any], Any] | None:
    return at_home if metavar in _PLACES else None


def chosen(**values: Any) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in values.items() if value is not None}


def prose(text: str | None) -> str:
    """A docstring whose paragraphs are lines, as wide as the terminal lets them be."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


def _plain(text: str) -> str:
    """Text in which the help sees no markup."""
    return text.replace("[", "\\[")


def as_window(text: str) -> tuple[float, float]:
    """``END`` or ``START,END``."""
    try:
        values = [float(part) for part in text.split(",")]
        if len(values) not in (1, 2) or any(math.isnan(value) for value in values):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"expected one fraction such as 0.8 or two such as 0.1,0.8, got '{text}'") from None
    return (0.0, values[0]) if len(values) == 1 else (values[0], values[1])


def as_size(text: str) -> tuple[int, int]:
    """``WIDTHxHEIGHT``."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"expected WIDTHxHEIGHT in pixels such as 512x768, got '{text}'")
    return int(parts[0]), int(parts[1])


def as_integers(text: str) -> tuple[int, ...]:
    """``N,N``."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise typer.BadParameter(f"expected whole numbers from 0 on such as 1,2, got '{text}'")
    return tuple(int(part) for part in text.split(","))


def as_layers(text: str) -> tuple[str | int, ...]:
    """``PATH,PATH``, numbers among them."""
    parts = [part.strip() for part in text.split(",")]
    return tuple(int(part) if part.isdecimal() else part for part in parts if part)


def as_name_and_value(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``, the value as JSON or, where it is none, as text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise typer.BadParameter(f"expected NAME=VALUE such as start_step=4, got '{text}'")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, at_home(value) if name in OPTION_FILES else value  # a bare word is text
