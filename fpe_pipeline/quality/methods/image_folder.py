"""A folder of one's own pictures with a file that says what each shows and what it is to become.

``prompts.csv`` has a heading, ``prompts.json`` is a list of objects; either names for each edit

- ``image``: a picture in the folder (also ``image_name``),
- ``source`` and ``target``: the prompts (also ``source_prompt``, ``soure_prompt``, as the published lists of
  Free-Prompt-Editing spell it, ``target_prompt`` and ``edit_prompt``),

and may name

- ``mask``: a picture of the same size, white where the object is,
- ``object``, ``target_object``: the word of either prompt that names it (by default the same word, where both have it),
- ``kind``: what the edit is counted under; ``background`` says that the background is to change.

Everything is looked at before anything is computed, and all that is wrong is said at once.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ...embedded.scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS
from ...errors import InputError
from ...images.load import load_image, upright_size
from ...lists import OTHER_FIELDS, csv_rows, named_once, read_list
from ...texts import check_text
from .subjects import Subject
from .tally import ALL

__all__ = ["PROMPT_FILES", "folder_digest", "folder_subjects"]

PROMPT_FILES = ("prompts.csv", "prompts.json")
_NAMES = {
    "image": ("image", "image_name"),
    "source": ("source", "source_prompt", "soure_prompt"),
    "target": ("target", "target_prompt", "edit_prompt"),
    "mask": ("mask",),
    "object": ("object",),
    "target_object": ("target_object",),
    "kind": ("kind",),
}
_NEEDED = ("image", "source", "target")


def folder_subjects(folder: Path) -> list[Subject]:
    """The edits that a folder's prompts file asks for.

    Raises:
        InputError: no folder, no prompts file or two, or a list of all that is missing or damaged in it.
    """
    entries = _entries(_prompts_file(folder))
    subjects, problems = [], []
    for number, entry in enumerate(entries, start=1):
        try:
            subjects.append(_subject(folder, entry))
        except InputError as error:
            problems.append(f"edit {number}: {error}")
    names = [subject.name for subject in subjects]
    problems += [f"'{name}' is asked for twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise InputError(f"'{folder}' cannot be evaluated: {'; '.join(problems)}")
    return subjects


def folder_digest(folder: Path) -> str:
    """Of the prompts file and of all pictures that it names."""
    digest = hashlib.sha256(_prompts_file(folder).read_bytes())
    for subject in folder_subjects(folder):
        for path in (subject.picture, subject.mask):
            if isinstance(path, Path):
                digest.update(path.read_bytes())
    return f"{folder.name}, {digest.hexdigest()[:16]}"


def _prompts_file(folder: Path) -> Path:
    wanted = " or ".join(PROMPT_FILES)
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no folder: pass generated, held-out, or a folder of pictures with {wanted}")
    found = [folder / name for name in PROMPT_FILES if (folder / name).is_file()]
    if len(found) != 1:
        raise InputError(f"expected {wanted} in '{folder}', found {'both' if found else 'neither'}")
    return found[0]


def _entries(path: Path) -> list[dict[str, str]]:
    try:
        text = read_list(path)
        is_json = path.suffix == ".json"
        given: Any = json.loads(text, object_pairs_hook=named_once) if is_json else csv_rows(text)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"cannot read '{path}': {error}") from error
    if not is_json and (bad := [str(number) for number, entry in enumerate(given, start=1) if entry is None]):
        raise InputError(f"'{path}' cannot be evaluated: edit {', '.join(bad)}: {OTHER_FIELDS}")
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given) or not given:
        raise InputError(f"expected '{path}' to list at least one edit, with {', '.join(_NEEDED)} for each")
    return [_known(entry) for entry in given]


def _known(entry: Mapping[Any, Any]) -> dict[str, str]:
    """The entry under our names, without what is empty."""
    return {
        name: str(entry[given]).strip()
        for name, spellings in _NAMES.items()
        for given in spellings
        if entry.get(given) not in (None, "")
    }


def _subject(folder: Path, entry: Mapping[str, str]) -> Subject:
    missing = [name for name in _NEEDED if not entry.get(name)]
    if missing:
        raise InputError(f"{' and '.join(missing)} missing")
    for name, text in entry.items():
        try:
            check_text(name, text)
        except ValueError as error:
            raise InputError(str(error)) from None
    picture = folder / entry["image"]
    mask = folder / entry["mask"] if "mask" in entry else None
    for path in (picture, mask):
        if path is not None:
            load_image(path, multiple=1)
    if mask is not None and _upright_size(mask) != _upright_size(picture):
        sizes = ["{}x{}".format(*_upright_size(path)) for path in (mask, picture)]
        raise InputError(
            f"the mask '{mask}' has {sizes[0]} pixels and '{picture}' {sizes[1]}: make one of the picture's size"
        )
    if entry.get("kind") == ALL:
        raise InputError(f"kind '{ALL}' stands for all edits together: call it something else")
    source, target = entry["source"].split(), entry["target"].split()
    for name, words in (("object", source), ("target_object", target)):
        if name in entry and not _has(words, entry[name]):
            raise InputError(f"the {name} '{entry[name]}' is not in the prompt '{' '.join(words)}'")
    word = entry.get("object")
    other_word = entry.get("target_object", word if word is not None and _has(target, word) else None)
    return Subject(
        name=f"{entry['image']}: {entry['target']}",
        kind=entry.get("kind", "own"),
        source_prompt=entry["source"],
        target_prompt=entry["target"],
        new_words=tuple(dict.fromkeys(w for w in target if w not in source)),
        region_words=None if word is None or other_word is None else (word, other_word),
        object_word=word,
        picture=picture,
        picture_name=entry["image"],
        mask=mask,
        scene=_scene(target),
    )


def _has(words: list[str], phrase: str) -> bool:
    return f" {phrase} " in f" {' '.join(words)} "


def _upright_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return upright_size(image)


def _scene(words: list[str]) -> tuple[str, str, str] | None:
    """What a prompt asks for in the judge's terms; None where it is not one of the embedded model's scenes."""
    named = [[word for word in words if word in known] for known in (OBJECTS, tuple(COLOURS), BACKGROUNDS)]
    if any(len(found) != 1 for found in named):
        return None
    return named[0][0], named[1][0], named[2][0]
