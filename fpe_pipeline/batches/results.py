"""What a batch leaves behind: pictures, each written whole or not at all, and a manifest that says which are whole.

A line of the manifest is written, and is on the disk, after the picture that it names. Killed between the two, the
picture is made again, to the same bytes; killed within a line, the line is none.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..atomic_folder import clear_left, replaced, write_text
from .making import SOURCES, Made
from .plan import Group, Unit

__all__ = ["MANIFEST", "Results"]

MANIFEST = "manifest.jsonl"


class Results:
    """The folder of a batch.

    Args:
        folder: made with the first picture.
        groups: of the batch; what is there of other ones is left alone.
    """

    def __init__(self, folder: Path, groups: Iterable[Group]) -> None:
        self.folder = folder
        self._path = folder / MANIFEST
        self._order: dict[str, None] = {}  # in which files are asked for by the thousand
        units: dict[str, str] = {}
        for group in groups:
            self._order |= dict.fromkeys(_file(group, name) for name in (*SOURCES, *(job.name for job in group.jobs)))
            units |= {_file(group, job.name): unit.digest for unit in group.units for job in unit.jobs}
            clear_left(folder / group.folder)
        self.entries: dict[str, dict[str, Any]] = {}
        for file, entry in self._lines():
            if file in self._order and entry.get("unit", "") == units.get(file, "") and self._is_whole(entry):
                self.entries[file] = entry

    def entry(self, group: Group, name: str) -> dict[str, Any] | None:
        """The manifest's line of a job's picture or a source's file; None where there is none yet."""
        return self.entries.get(_file(group, name))

    def keep(self, group: Group, unit: Unit | None, made: Made) -> None:
        """Write a picture and its line; ``unit`` is None of a source's file.

        Raises:
            OSError: one of them could not be written; the manifest is as it was.
        """
        file = _file(group, made.name)
        entry: dict[str, Any] = {"file": file, "sha256": hashlib.sha256(made.png).hexdigest()}
        entry["pixels_sha256"] = made.pixels
        if unit is not None:
            entry |= {"job": made.name, "unit": unit.digest, "seconds": made.seconds, "measures": made.measures}
        try:
            os.fsencode(file)
        except UnicodeEncodeError:
            coding = sys.getfilesystemencoding()
            said = f"the system's locale names files in {coding}, which does not have {file!r}; set LC_ALL=C.UTF-8"
            raise OSError(errno.EILSEQ, said) from None
        with replaced(self.folder / file) as partial:
            partial.write_bytes(made.png)
        self._append(json.dumps(entry, allow_nan=False) + "\n")
        self.entries[file] = entry

    def close(self) -> None:
        """Write the manifest anew, a line for each picture, in the order of the list; other lists' come first.

        Theirs are read now: another batch may have worked in the same folder meanwhile.
        """
        others = {file: entry for file, entry in self._lines() if file not in self._order}
        entries = [*others.values(), *(self.entries[file] for file in self._order if file in self.entries)]
        lines = [json.dumps(entry, allow_nan=False) + "\n" for entry in entries]
        if lines:
            write_text(self._path, "".join(lines))

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        """The manifest's lines with the files that they name."""
        if not self._path.exists():
            return []
        found = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # cut short: what it named is made again
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("file"), str):
                    found.append((entry["file"], entry))
        return found

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        try:
            content = (self.folder / entry["file"]).read_bytes()
        except OSError:
            return False
        return hashlib.sha256(content).hexdigest() == entry.get("sha256")

    def _append(self, line: str) -> None:
        with self._path.open("ab") as file:
            before = file.tell()
            try:
                # A line that was cut short before this one ends here.
                file.write((b"\n" if before else b"") + line.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(before)
                raise


def _file(group: Group, name: str) -> str:
    return f"{group.folder}/{name if name in SOURCES else f'{name}.png'}"
