"""Files that a method's options name: where they lie, and whether they are what they were."""

from __future__ import annotations

import contextlib
import hashlib
import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .settings import Settings

__all__ = ["OPTION_FILES", "check_option_files", "option_files", "with_places"]

#: The options whose texts are paths.
OPTION_FILES = ("mask",)


def with_places(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options whose files are named by whole paths, so that they are found from other folders too."""
    return dict(options) | {name: str(path.resolve()) for name, path in _files(options).items()}


def option_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of the files, under "files": the SHA-256 of each by its option; {} where there are none."""
    digests: dict[str, str] = {}
    for name, path in _files(options).items():
        with contextlib.suppress(OSError):  # of which the edit says more
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"files": digests} if digests else {}


def check_option_files(settings: Settings, record: Mapping[str, Any]) -> None:
    """Raise InputError where a file that a record's options name is another one now; a missing one the edit refuses."""
    recorded, now = record.get("files"), option_files(settings.options).get("files", {})
    then = recorded if isinstance(recorded, dict) else {}
    changed = [name for name, digest in now.items() if then.get(name, digest) != digest]
    if changed:
        given = " ".join(f"--option {name}={settings.options[name]}" for name in changed)
        raise InputError(
            f"the file of the option {', '.join(changed)} is not the one of the record: it was changed since; put that "
            f"one back, or pass {given} to use this one all the same"
        )


def _files(options: Mapping[str, Any]) -> dict[str, Path]:
    texts = {name: options[name] for name in OPTION_FILES if isinstance(options.get(name), str)}
    return {name: Path(text) for name, text in texts.items() if os.path.isfile(text)}  # which no text is too long for
