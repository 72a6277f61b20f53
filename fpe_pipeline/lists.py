"""Lists that people write by hand or in a spreadsheet: their text, names that stand once, the rows of a CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = ["OTHER_FIELDS", "csv_rows", "named_once", "read_list"]

#: What is wrong with a row that :func:`csv_rows` cannot read.
OTHER_FIELDS = "another number of fields than the heading has; a text that holds the separator stands in quotes"
#: Spreadsheets of languages with decimal commas separate fields by semicolons; what is copied from one has tabs.
_SEPARATORS = ",;\t"


def read_list(path: Path) -> str:
    """The text of a list.

    Raises:
        InputError: it is written in another encoding than UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"'{path}' is no text in UTF-8, from byte {error.start} on; save it as UTF-8 (in Excel 'CSV UTF-8')"
        ) from error


def named_once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Names with values; ValueError for a name that stands there twice, of which readers keep the last alone."""
    named: dict[Any, Any] = {}
    for name, value in pairs:
        if name in named:
            raise ValueError(f"{name!r} is named twice: leave one out, or write a row for each")
        named[name] = value
    return named


def csv_rows(text: str) -> list[dict[str, str] | None]:
    """Rows by the names of a CSV's heading, without blanks around names and values, and without rows that are blank.

    Fields are separated by what separates the heading's: commas, else semicolons or tabs. A row of another number of
    fields is None, for which :data:`OTHER_FIELDS` is the reason: its values stand under wrong names.

    Raises:
        ValueError: a name stands in the heading twice.
        csv.Error: no CSV.
    """
    heading = text.lstrip().partition("\n")[0]
    separator = next((one for one in _SEPARATORS if one in heading), ",")
    lines = [[value.strip() for value in line] for line in csv.reader(StringIO(text, newline=""), delimiter=separator)]
    names, *rows = [line for line in lines if any(line)] or [[]]
    named_once((name, None) for name in names if name)
    return [dict(zip(names, row, strict=True)) if len(row) == len(names) else None for row in rows]
