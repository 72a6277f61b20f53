"""What an evaluation leaves behind: the lines of a run that can be continued, and its settings and versions."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic_folder import staged
from ..errors import InputError

__all__ = ["ScoreFile", "brief", "configuration", "dump", "environment", "fingerprint", "packed", "plain", "unpacked"]


class ScoreFile:
    """Scores as JSON lines, the first of which holds the settings: whatever is in the file is not computed again.

    Args:
        path: of the file; made with the first score.
        settings: JSON-ready; those that a file was made with.

    Raises:
        InputError: the file holds scores made with other settings, or something else.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self.rows: list[dict[str, Any]] = []
        self._left = _size(path)  # bytes, as this run left it
        if not path.exists():
            return
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # Of a line that an interruption cut short nothing can be said: its score is computed again.
            whole = [line for line in lines if line.endswith("\n")]
            known = [dict(json.loads(line)) for line in whole]
        except (OSError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged: {error}; choose another output folder or delete it") from error
        if known and known[0] != self._settings:
            raise InputError(f"{path} holds scores made with other settings: choose another output folder or delete it")
        self.rows = known[1:]
        if len(whole) < len(lines) or not known:
            self._rewrite()

    def add(self, *rows: dict[str, Any]) -> None:
        """Keep scores, in the file too.

        Raises:
            InputError: another run has written to the file since this one did: the scores of both would count.
        """
        if _size(self._path) != self._left:
            raise InputError(
                f"another run writes to {self._path}: expected a folder for one run at a time; wait until that one "
                "ends and run this one again, which continues it, or choose another output folder"
            )
        new = [] if self._path.exists() else [self._settings]
        self.rows += rows
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in (*new, *rows))
        self._left = _size(self._path)

    def keep(self, count: int) -> None:
        """Forget all but the first ``count`` scores, in the file too."""
        if count < len(self.rows):
            self.rows = self.rows[:count]
            self._rewrite()

    def _rewrite(self) -> None:
        with staged(self._path.parent) as stage:
            lines = [json.dumps(row) + "\n" for row in (self._settings, *self.rows)]
            (stage / self._path.name).write_text("".join(lines), encoding="utf-8")
        self._left = _size(self._path)


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def plain(value: Any) -> Any:
    """A figure as it is kept: numbers for truth values, four decimals."""
    if isinstance(value, bool):
        return int(value)
    return round(value, 4) if isinstance(value, float) else value


#: How files of weights end that a pipeline is loaded from.
_WEIGHTS = (".safetensors", ".bin")
_PIECE = 2**20  # bytes


def fingerprint(folder: Path) -> str:
    """Of the weights in a model folder, read a piece at a time: a file may be larger than the memory."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _WEIGHTS):
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()[:16]


def configuration(folder: Path) -> str:
    """Of what else a model folder has that decides its pictures: the settings of each part, scheduler and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted([folder / "model_index.json", *folder.glob("*/*")]):
        if path.is_file() and path.suffix not in _WEIGHTS:
            digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
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


def brief(result: dict[str, Any]) -> str:
    """The result as JSON, without the single scores."""
    return json.dumps({name: value for name, value in result.items() if name != "scores"}, indent=2)


def dump(result: dict[str, Any]) -> str:
    """The result as JSON, a line for each score."""
    rows = result["scores"]["rows"]
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps({**result, "scores": {**result["scores"], "rows": "ROWS"}}, indent=1)
    before, after = text.rsplit('"ROWS"', 1)  # the last: a kind of edit may be called so
    return f"{before}[\n{lines}\n]{after}\n"
