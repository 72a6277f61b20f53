"""What an evaluation leaves behind: the lines of a run that can be continued, and its settings and versions."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["ScoreFile", "dump", "environment", "fingerprint", "packed", "plain", "unpacked"]


class ScoreFile:
    """Scores as JSON lines, the first of which holds the settings: whatever is in the file is not computed again.

    Args:
        path: of the file; made if missing.
        settings: JSON-ready; those that a file was made with.

    Raises:
        ValueError: the file holds scores made with other settings, or something else.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            # Of a line that an interruption cut short nothing can be said: its score is computed again.
            whole = [line for line in lines if line.endswith("\n")]
            try:
                known = [json.loads(line) for line in whole]
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}; choose another output folder or delete it") from error
            if known and known[0] != json.loads(json.dumps(settings)):
                raise ValueError(
                    f"{path} holds scores made with other settings: choose another output folder or delete it"
                )
            self.rows = known[1:]
            if known:
                path.write_text("".join(whole))
                return
        path.write_text(json.dumps(settings) + "\n")

    def add(self, *rows: dict[str, Any]) -> None:
        """Keep scores, in the file too."""
        self.rows += rows
        with self._path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def keep(self, count: int) -> None:
        """Forget all but the first ``count`` scores, in the file too."""
        self.rows = self.rows[:count]
        with self._path.open() as file:
            settings = file.readline()
        self._path.write_text(settings + "".join(json.dumps(row) + "\n" for row in self.rows))


def plain(value: Any) -> Any:
    """A figure as it is kept: numbers for truth values, four decimals."""
    if isinstance(value, bool):
        return int(value)
    return round(value, 4) if isinstance(value, float) else value


def fingerprint(folder: Path) -> str:
    """Of the weights in a model folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def environment() -> dict[str, str]:
    """Versions that a score may depend on."""
    import diffusers
    import torch
    import transformers

    import fpe_kernels

    packages = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "fpe-kernels": fpe_kernels}
    versions = {name: str(package.__version__) for name, package in packages.items()}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}


def packed(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Columns named once, rows of plain values: a tenth of the repetition."""
    columns = list(scores[0])
    return {"columns": columns, "rows": [[row[name] for name in columns] for row in scores]}


def unpacked(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """What :func:`packed` was given."""
    return [dict(zip(scores["columns"], row, strict=True)) for row in scores["rows"]]


def dump(result: dict[str, Any]) -> str:
    """The result as JSON, a line for each score."""
    rows = result["scores"]["rows"]
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps({**result, "scores": {**result["scores"], "rows": "ROWS"}}, indent=1)
    return text.replace('"ROWS"', f"[\n{lines}\n]") + "\n"
