"""One run for each value of a setting, or of two, and a contact sheet of them."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_folder import staged
from ..errors import InputError
from ..models.loading import identity, pick_device, pick_dtype
from ..models.quiet import only_errors
from ..models.sources import find_model
from ..texts import did_you_mean
from .loading import load_pipeline
from .making import Loaded, invert, photo_for, pinned, solver_of_pictures
from .picture_record import PHOTO
from .progress import Progress, show_steps
from .run import execute, write
from .settings import Settings

if TYPE_CHECKING:
    from .result import Run

__all__ = ["Axis", "check_number", "check_sweep", "parsed_axis", "sweep"]

#: Settings that a sweep may go over, and what their values are.
_SETTINGS: dict[str, type[Any]] = {
    "self_replace": float,
    "guidance": float,
    "inversion_guidance": float,
    "early_stop": float,
    "seed": int,
    "steps": int,
    "max_tokens": int,
    "inner_steps": int,
    "method": str,
    "inversion": str,
}
#: Of these, the ones that a picture's inversion hangs on.
_OF_AN_INVERSION = ("guidance", "inversion_guidance", "early_stop", "steps", "inner_steps", "inversion")
#: What JSON has beside numbers and texts.
_WORDS = {"true": True, "false": False, "null": None}
#: Runs of a sweep, whose pictures stay in memory for one sheet of them.
_MOST = 1000
_RANGE = re.compile(r"([^:]+):([^:]+):(\d+)")


@dataclass(frozen=True)
class Axis:
    """A setting, or an option of a method, and its values.

    Args:
        name: as the settings or the method call it.
        values: at least one.
    """

    name: str
    values: tuple[Any, ...]

    def label(self, value: Any) -> str:
        """What stands beside a picture, and names a folder."""
        said = f"{value:g}" if isinstance(value, float) else value
        if isinstance(value, bool) or value is None:
            said = json.dumps(value)  # as it was written
        return f"{self.name.replace('_', '-')}={said}"

    def applied(self, settings: Settings, value: Any) -> Settings:
        """The settings with one of the values."""
        if self.name == "self_replace":
            return settings.changed(self_replace=(min(settings.self_replace[0], value), value))
        if self.name in _SETTINGS:
            return settings.changed(**{self.name: value})
        return settings.changed(options={**settings.options, self.name: value})


def parsed_axis(text: str) -> Axis:
    """``NAME=START:STOP:COUNT``, as many values at equal distances, both ends among them, or ``NAME=VALUE,VALUE``.

    Raises:
        InputError: it is not written so.
    """
    name, equals, said = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name.isidentifier() or not said.strip():
        raise InputError(
            f"expected NAME=START:STOP:COUNT or NAME=VALUE,VALUE such as self-replace=0.2:1.0:5, got '{text}'"
        )
    kind = _SETTINGS.get(name)
    if kind is None and name in Settings.model_fields:
        hint = did_you_mean([name], _SETTINGS).rstrip()
        raise InputError(f"a sweep does not go over {name}: it goes over {', '.join(_SETTINGS)} or an option; {hint}")
    between = _RANGE.fullmatch(said.strip())
    words = [word.strip() for word in said.split(",")]
    values = _between(between, text) if between else [_number(word) for word in words]
    if kind is None:  # an option, which is written as --option has it: false is no word, which would be true
        values = [_WORDS.get(value, value) if isinstance(value, str) else value for value in values]
    if kind is float:
        values = [float(value) if isinstance(value, int) else value for value in values]
    if kind is not None and any(type(value) is not kind for value in values):
        expected = {int: "whole numbers", float: "numbers", str: "names"}[kind]
        raise InputError(f"{name} goes over {expected}, got {said.strip()}")
    return Axis(name, tuple(dict.fromkeys(values)))


def check_number(runs: int) -> None:
    """Raise InputError for more runs than a sheet can show, before they are written out."""
    if runs > _MOST:
        raise InputError(f"a sheet is of {_MOST} runs at most, got {runs}; ask for fewer, or list them for fpe batch")


def check_sweep(settings: Settings, axes: Sequence[Axis]) -> None:
    """Check every run of a sweep before weights are read.

    Raises:
        InputError: three axes, one named twice, values that make no sense.
    """
    if not 1 <= len(axes) <= 2 or len({axis.name for axis in axes}) < len(axes):
        raise InputError("a contact sheet has columns and rows: sweep over one setting or over two")
    check_number(math.prod(len(axis.values) for axis in axes))
    if settings.image is not None and any(axis.name == "seed" for axis in axes):
        raise InputError("a real picture brings its own noise, so seeds change nothing: leave --images and seeds out")
    for _, run in _runs(settings, axes):
        run.check()


def sweep(settings: Settings, axes: Sequence[Axis], directory: Path, progress: Progress) -> list[Path]:
    """Make every run of a sweep, each into a folder of its own, and a sheet for each target.

    The model is loaded once, and a real picture inverted once where no axis is about its inversion.

    Args:
        settings: of all runs; checked, with the axes, by :func:`check_sweep`.
        axes: the columns, and the rows where there are two.
        directory: receives the folders and sweep-1.png, sweep-2.png …, one a target; a single one is sweep.png.

    Returns:
        The paths, sheets first.
    """
    from ..images.contact_sheet import contact_sheet

    device = pick_device(settings.device)
    with only_errors(), pinned(settings, device):
        source = find_model(settings.model)
        pipe = load_pipeline(source, dtype=pick_dtype(settings.dtype, device, source), device=device)
        loaded = Loaded(pipe, identity(pipe))
        if settings.image is not None and not {axis.name for axis in axes} & {*_OF_AN_INVERSION}:
            loaded = replace(loaded, inversion=_inverted(pipe, settings, progress))
    made: list[Run] = []
    written: list[Path] = []
    asked = list(_runs(settings, axes))
    for (labels, run), folder in zip(asked, _folders([labels for labels, _ in asked]), strict=True):
        made.append(execute(run, progress=progress, name=", ".join(labels), loaded=loaded))
        written += write(made[-1], directory / folder)
    columns, *rest = axes
    heads = [columns.label(value) for value in columns.values]
    names = [rest[0].label(value) for value in rest[0].values] if rest else [""]
    sheets = []
    with staged(directory) as stage:
        for number, target in enumerate(settings.targets):
            images = [run.edited[number] for run in made]
            rows = [images[start : start + len(heads)] for start in range(0, len(images), len(heads))]
            name = "sweep.png" if len(settings.targets) == 1 else f"sweep-{number + 1}.png"
            contact_sheet(rows, heads, names, target).save(stage / name)
            sheets.append(directory / name)
    return [*sheets, *(path for path in written if path.name != PHOTO)]


def _runs(settings: Settings, axes: Sequence[Axis]) -> Iterator[tuple[list[str], Settings]]:
    """Labels and settings of each run, row by row; the runs are compared with one another, so none has a control."""
    columns, *rest = axes
    plain = settings.with_values(control=False)
    for row in rest[0].values if rest else (None,):
        for value in columns.values:
            labels, run = [columns.label(value)], columns.applied(plain, value)
            if rest:
                labels, run = [*labels, rest[0].label(row)], rest[0].applied(run, row)
            yield labels, run


def _folders(labels: Sequence[Sequence[str]]) -> list[str]:
    """A folder's name for the labels of each run: a value may be a path, which must not lead elsewhere, and two values
    may be written alike."""
    names: list[str] = []
    for each in labels:
        plain = re.sub(r"[/\\]+", "-", ",".join(each))
        numbered = (plain if number == 1 else f"{plain}-{number}" for number in itertools.count(1))
        names.append(next(name for name in numbered if name not in names))
    return names


def _inverted(pipe: Any, settings: Settings, progress: Progress) -> Any:
    photo, scheduler = photo_for(pipe, settings), pipe.scheduler
    assert photo is not None
    show_steps(pipe, "invert", progress)
    try:
        pipe.scheduler = solver_of_pictures(pipe)
        return invert(pipe, photo, settings)
    finally:
        pipe.scheduler = scheduler
        pipe.__dict__.pop("progress_bar", None)


def _between(said: re.Match[str], text: str) -> list[Any]:
    first, last, number = _number(said[1].strip()), _number(said[2].strip()), int(said[3])
    if isinstance(first, str) or isinstance(last, str) or number < 2:
        raise InputError(f"expected two numbers and how many values, two or more, such as 0.2:1.0:5, got '{text}'")
    check_number(number)
    values = [first + (last - first) * index / (number - 1) for index in range(number)]
    # Ends of few digits have values of few digits between them: 0.6, and not 0.6000000000000001.
    values = [float(f"{value:.10g}") for value in values]
    whole = isinstance(first, int) and isinstance(last, int) and all(value.is_integer() for value in values)
    return [int(value) for value in values] if whole else values


def _number(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
