"""What a stage says while it runs: one line of JSON a finding, kept at once by whoever listens.

A stage prints its lines on its standard output behind a mark that no other output has. The session that started it is
the only one who writes them down, so a stage that is killed loses nothing that it has said.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..rows import Row, _plain

MARK = "\x1e"  # the record separator of ASCII

ORACLE = "fpe-reference"  # the equations as they stand: in half precision as wrong as the roundings of a stored map

Record = dict[str, Any]
"""`kind` says what it is: "stage" (its outcome), "begin" (a check that starts), "check", "row", "note", "failure"."""


def say(kind: str, **values: Any) -> None:
    """Tell the session; without one, the line stands in the output."""
    sys.stdout.write(MARK + json.dumps({"kind": kind, **values}, default=str) + "\n")
    sys.stdout.flush()


def say_row(row: Row) -> None:
    """A measurement. One of ours that is wrong or failed is a failure of the session too."""
    say("row", row=_plain(row))
    ours = row.provider.startswith(("fpe", "full", "recorded")) and row.provider != ORACLE and "@" not in row.provider
    if row.status in ("wrong", "failed") and ours:
        say("failure", what=f"{row.suite} {row.case}, {row.provider}", why=f"{row.status}: {row.reason}")


def heard(line: str) -> Record | None:
    """The record of a line of a stage's output; None for any other line."""
    if not line.startswith(MARK):
        return None
    try:
        record = json.loads(line.removeprefix(MARK))
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


@dataclass
class Journal:
    """A file of records, written line by line. Where the disk refuses, lines wait, and are told at the end."""

    path: Path
    waiting: list[str] = field(default_factory=list)
    problem: str = ""

    def keep(self, record: Record) -> None:
        self.waiting.append(json.dumps(record, default=str))
        self.flush()

    def flush(self) -> None:
        """Write what waits. A line that came through in part only is begun again behind a line break."""
        while self.waiting:
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                try:
                    line = ("\n" if self.problem else "") + self.waiting[0] + "\n"
                    content = line.encode()
                    if os.write(descriptor, content) != len(content):
                        raise OSError(28, os.strerror(28))
                finally:
                    os.close(descriptor)
            except OSError as error:
                self.problem = f"{self.path} cannot be written: {error.strerror}"
                return
            self.waiting.pop(0)
            self.problem = ""

    def rescue(self, output: TextIO) -> Path | None:
        """Bring what still waits to another place: a temporary file, else the output."""
        if not self.waiting:
            return None
        text = "\n".join(self.waiting) + "\n"
        try:
            with tempfile.NamedTemporaryFile("w", prefix="gpu-records-", suffix=".jsonl", delete=False) as file:
                file.write(text)
            return Path(file.name)
        except OSError:
            output.write(text)
            return None


def read_journal(path: Path) -> Iterator[Record]:
    """The records of a file; a line that was cut is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            yield record


def rows_of(records: Iterable[Record]) -> list[Row]:
    """The measurements among some records, each key once, the last one standing."""
    from ..rows import merge

    return merge([Row(**record["row"]) for record in records if record["kind"] == "row"])
