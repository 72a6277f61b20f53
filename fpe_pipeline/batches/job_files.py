"""Lists of edits as people have them: our own, those of Free-Prompt-Editing's paper, PIE-Bench's mapping file.

A file is JSON lines, a CSV with a heading, or JSON or YAML with a list of rows or rows by name. A row names a source
and a target or several, and may name a picture, a mask, a kind, and settings of its own. Most of these have more than
one spelling, and are read as they are:

- the paper's lists spell ``soure_prompt`` and ``edit_prompt``, and name pictures by class folder (``image_name``);
- its list of ImageNet's words has ``path``, ``source``, ``target`` and ``is_test``: the words are put into the paper's
  prompt, and rows that are not of the test are left out, as the paper does;
- PIE-Bench's ``mapping_file.json`` marks words of its prompts by brackets, which no model should read, and holds masks
  as runs of 512 × 512 pixels; its pictures lie in ``annotation_images`` beside it.
"""

from __future__ import annotations

import json
import os.path
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, refusals
from ..lists import OTHER_FIELDS, csv_rows, named_once, read_list
from ..runs.option_files import OPTION_FILES
from ..runs.settings import DEFAULTS, OF_NULL_TEXT, SELECTORS, Settings
from ..texts import check_no_address, did_you_mean
from .jobs import BadRow, Job
from .summary import KINDS

__all__ = ["OF_A_ROW", "read_jobs"]

#: What a row may say, by the spellings of the lists that there are.
_SPELLINGS = {
    "name": ("name", "id"),
    "image": ("image", "image_name", "image_path", "path"),
    "source": ("source", "source_prompt", "soure_prompt", "original_prompt"),
    "target": ("target", "target_prompt", "edit_prompt", "editing_prompt"),
    "targets": ("targets", "target_prompts"),
    "mask": ("mask",),
    "kind": ("kind", "editing_type_id"),
}
#: Settings that a row may have of its own; the rest are the batch's.
OF_A_ROW = (
    "negative", "seed", "steps", "guidance", "method", "self_replace", "levels", "max_tokens", "layers", "options",
    "size", "inversion", "inversion_guidance", "inner_steps", "early_stop",
)  # fmt: skip
#: What lists say beside that, and no edit needs: instructions, words, numbers of classes, a nameless first column.
_BESIDE = ("editing_instruction", "blended_word", "source_id", "target_id", "is_test", "image_id", "")
#: As JSON, Python and spreadsheets write it.
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
_SUFFIXES = (".jsonl", ".csv", ".json", ".yaml", ".yml")
_PAPER_PROMPT = "a photo of a {}"
_PIE_FOLDER = "annotation_images"
_NAME = re.compile(r"[\w.+-]+")
#: Bytes of a name, to which its file adds some beside it while it is written; file systems have 255.
_LONGEST = 200
#: Devices of Windows, which are no files there, whatever follows their names' first dot.
_DEVICES = ("con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³"))


def read_jobs(path: Path, defaults: Mapping[str, Any], images: Path | None = None) -> list[Job | BadRow]:
    """The edits that a file asks for, in its order, and the rows that ask for none.

    Args:
        path: ends in .jsonl, .csv, .json, .yaml or .yml.
        defaults: settings of every job that does not say otherwise.
        images: folder of the pictures; default: the file's own, and of PIE-Bench ``annotation_images`` in that.

    Raises:
        InputError: the file as a whole cannot be read, or is empty.
    """
    rows = list(_rows(path))
    if not rows:
        raise InputError(f"'{path}' asks for nothing: expected at least one row with a source and a target")
    folder = path.parent if images is None else images
    if images is None and (folder / _PIE_FOLDER).is_dir() and "image_path" in rows[0][1]:
        folder = folder / _PIE_FOLDER
    found: list[Job | BadRow] = []
    names: set[str] = set()
    for number, (name, row) in enumerate(rows, start=1):
        # Composed: some file systems know no other spelling of "é", and two spellings are one file there.
        name = unicodedata.normalize("NFC", name) or f"{number:04d}"
        try:
            jobs = list(_jobs(name, row, defaults, folder))
            if taken := [job.name for job in jobs if job.name.casefold() in names]:
                raise InputError(f"the name {taken[0]!r} is taken by a row before it; give it another")
        except InputError as error:
            found.append(BadRow(f"row {number}", str(error)))
            continue
        names |= {job.name.casefold() for job in jobs}
        found += jobs
    return found


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row with its name, where it has one; a line of JSON lines that is none becomes a row that says so."""
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(f"expected a list of edits in .jsonl, .csv, .json or .yaml, got '{path}'")
    try:
        text = read_list(path)
        if suffix == ".jsonl":
            # Not splitlines: a prompt may hold characters that end a line of Unicode's and none of JSON's.
            given: Any = [_line(line) for line in text.split("\n") if line.strip()]
        elif suffix == ".csv":
            given = [{_NOT_A_ROW: OTHER_FIELDS} if row is None else _uncsv(row) for row in csv_rows(text)]
        elif suffix == ".json":
            given = json.loads(text, object_pairs_hook=named_once)
        else:
            given = _of_yaml(text)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror or error}; pass a list of edits") from error
    except Exception as error:  # json's, yaml's and csv's own
        raise InputError(f"'{path}' is damaged: {' '.join(str(error).split())}") from error
    if isinstance(given, Mapping):
        named = [(str(name), row) for name, row in given.items()]
    elif isinstance(given, list):
        named = [("", row) for row in given]
    else:
        raise InputError(f"expected '{path}' to hold a list of edits or edits by name, got {type(given).__name__}")
    for name, row in named:
        row = row if isinstance(row, Mapping) else {_NOT_A_ROW: f"expected names with values, got {row!r}"}
        said = str(row.get("is_test", True)).casefold()
        if said not in _TRUTH:
            row = {_NOT_A_ROW: f"is_test, of a row of the test: expected true or false, got {row['is_test']!r}"}
        if _TRUTH.get(said, True):
            names = (row.get(spelling) for spelling in _SPELLINGS["name"])
            own = str(next((one for one in names if one not in (None, "")), ""))
            if name and own not in ("", name):
                row = {_NOT_A_ROW: f"the name is said twice: the list calls the row {name!r}, the row itself {own!r}"}
            yield name or own, row


def _of_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc] # which has no types
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            named_once((key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            return node

    return yaml.load(text, Loader)


#: Stands in for a row's content where it has none.
_NOT_A_ROW = "not a row"


def _line(line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=named_once)
    except ValueError as error:
        return {_NOT_A_ROW: f"no JSON: {error}"}


def _uncsv(row: Mapping[str, str]) -> dict[str, Any]:
    """A CSV's row without what is empty; settings that are not text are written as JSON."""
    read: dict[str, Any] = {}
    for name, value in row.items():
        if not value:
            continue
        read[name] = value
        if (name in OF_A_ROW and name not in ("negative", "method", "inversion")) or name == "targets":
            try:
                read[name] = json.loads(value)
            except ValueError:
                continue  # what is wrong with it, the settings say
    return read


def _jobs(name: str, row: Mapping[str, Any], defaults: Mapping[str, Any], folder: Path) -> Iterator[Job]:
    if _NOT_A_ROW in row:
        raise InputError(str(row[_NOT_A_ROW]))
    _check_name(name)
    said = _known(row)
    if "target" in said and "targets" in said:
        raise InputError("the target is said twice, as one and as several: write all of them as targets")
    targets = said.get("targets", [said["target"]] if "target" in said else [])
    if not isinstance(targets, list):
        raise InputError(f"targets are a list of prompts, got {targets!r}; of a single one say target")
    if not targets:
        raise InputError(f"the target is missing: expected {' or '.join(_SPELLINGS['target'])}")
    if "source" not in said and "image" not in said:
        raise InputError(f"the source is missing: expected {' or '.join(_SPELLINGS['source'])}")
    source = said.get("source", "")
    if "is_test" in row:
        source, targets = _PAPER_PROMPT.format(source), [_PAPER_PROMPT.format(target) for target in targets]
    if "editing_prompt" in row:
        source, targets = _unmarked(source), [_unmarked(target) for target in targets]
    own = {setting: _plain(setting, row[setting]) for setting in OF_A_ROW if row.get(setting) is not None}
    if isinstance(own.get("options", {}), dict):
        own["options"] = _joined(defaults, own.get("method"), _placed(folder, own.get("options", {})))
    if own.keys() & set(SELECTORS):  # a choice of layers takes the place of another, of whichever kind
        defaults = {name: value for name, value in defaults.items() if name not in SELECTORS}
    image = None if "image" not in said else str(_picture(folder, str(said["image"])))
    mask = said.get("mask")
    if mask is not None:
        mask = tuple(mask) if isinstance(mask, list) else str(_picture(folder, str(mask)))
    kind = str(said.get("kind", ""))
    if kind in KINDS:
        raise InputError(f"kind {kind!r} stands for other rows in the summary: call it something else")
    for number, target in enumerate(targets, start=1):
        settings = Settings.of_model(**{**defaults, **own, "source": source, "targets": [target], "image": image})
        if OF_NULL_TEXT & own.keys() and not settings.optimises:
            raise InputError(
                "inner_steps and early_stop are null-text inversion's, by which this row inverts no picture: say an "
                "image and an inversion of null-text as well, or leave them out"
            )
        of_several = f"{name}-{number}" if len(targets) > 1 else name
        yield Job(of_several, settings.with_values(control=False), mask, kind)


def _check_name(name: str) -> None:
    """Raise InputError where a name makes no file, or another one than the job's."""
    # Accents and the vowel signs of Hindi are marks, which are no letters to a regular expression.
    if not _NAME.fullmatch("".join(letter for letter in name if not unicodedata.category(letter).startswith("M"))):
        raise InputError(f"the name becomes a file: expected letters, digits, '.', '_', '+' and '-', got {name!r}")
    if len(name.encode()) > _LONGEST:
        raise InputError(f"the name becomes a file: expected {_LONGEST} bytes at most, got {len(name.encode())}")
    if (device := name.partition(".")[0]).lower() in _DEVICES:
        raise InputError(f"the name becomes a file: {device!r} is a device on Windows, got {name!r}; give it another")
    if name.casefold() in ("source", "photo") or name.casefold().endswith(".png"):
        raise InputError(f"the name {name!r} is that of a file beside the edits; give it another, without .png")


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says under our names, without what is empty."""
    spellings = [spelling for several in _SPELLINGS.values() for spelling in several]
    known = (*spellings, *OF_A_ROW, *_BESIDE)
    if unknown := [str(name) for name in row if name not in known]:
        hint = did_you_mean(unknown, known).rstrip()
        raise InputError(f"a row says nothing by the name of {', '.join(unknown)}" + (f"; {hint}" if hint else ""))
    said: dict[str, Any] = {}
    for name, several in _SPELLINGS.items():
        given = [row[spelling] for spelling in several if row.get(spelling) not in (None, "")]
        if len(given) > 1 and any(value != given[0] for value in given):
            raise InputError(f"the {name} is said twice, by {' and '.join(s for s in several if s in row)}")
        if given:
            said[name] = given[0]
    return said


def _plain(setting: str, value: Any) -> Any:
    """A setting as `Settings` takes it: an end of a window or ``512x768`` may stand for both of its numbers."""
    if setting == "self_replace" and isinstance(value, int | float):
        return (0.0, float(value))
    if setting == "size" and isinstance(value, str):
        sides = value.lower().split("x")
        return tuple(int(side) for side in sides) if all(side.isdecimal() for side in sides) else value
    if setting in ("self_replace",) and isinstance(value, list):
        return [float(end) if isinstance(end, int) else end for end in value]
    return float(value) if setting in _FLOATS and isinstance(value, int) and not isinstance(value, bool) else value


_FLOATS = ("guidance", "inversion_guidance", "early_stop")


def _picture(folder: Path, name: str) -> Path:
    """Where a picture of that name is: in the folder, or there by its last part where class folders were left out."""
    with refusals():
        check_no_address(name)
    name = os.path.expanduser(name)
    path = folder / name
    flat = folder / Path(name).name
    return (flat if not path.exists() and flat.exists() else path).resolve()


def _placed(folder: Path, options: dict[Any, Any]) -> dict[Any, Any]:
    """A row's options, whose files lie where its picture and its mask do."""
    files = {name: str(_picture(folder, options[name])) for name in OPTION_FILES if isinstance(options.get(name), str)}
    return {**options, **files}


def _joined(defaults: Mapping[str, Any], method: str | None, options: dict[Any, Any]) -> dict[Any, Any]:
    """A row's options beside those of all rows, which are the batch's method's and no other one's."""
    same = method in (None, defaults.get("method", DEFAULTS.method))
    return {**(defaults.get("options", {}) if same else {}), **options}


def _unmarked(prompt: Any) -> Any:
    return prompt.replace("[", "").replace("]", "") if isinstance(prompt, str) else prompt
