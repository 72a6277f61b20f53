"""Which jobs are made together: groups that share a source, units that are denoised at once.

A group's source is generated, or its picture inverted, once. A unit's targets are rows of one batch, in which sums may
round otherwise than in another one: units are therefore the same in every run of a list, and a unit of which anything
is missing is made again whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..models.sources import find_model
from ..runs.edit_class import edit_class
from ..runs.option_files import option_files
from ..runs.settings import Settings
from .jobs import Job

__all__ = ["OF_THE_EDIT", "Group", "Unit", "groups_of", "model_stamp"]

#: Settings that decide an edit and not its source.
OF_THE_EDIT = ("targets", "method", "self_replace", "levels", "max_tokens", "layers", "options", "control")
#: Settings that decide neither: by the number of threads sums round, and a picture's record says it.
_OF_NEITHER = ("image", "model", "threads")  # of image and model, the content counts


@dataclass(frozen=True)
class Unit:
    """Jobs that are denoised at once: one edit, one source, a target each.

    Args:
        jobs: in the order of the list.
        digest: of everything that decides their pictures, as far as it is known before weights are read.
    """

    jobs: tuple[Job, ...]
    digest: str

    @property
    def settings(self) -> Settings:
        """Of all of them together."""
        return together(self.jobs)


@dataclass(frozen=True)
class Group:
    """Units of one source.

    Args:
        folder: name of the folder that its pictures go to.
        units: in the order of the list.
    """

    folder: str
    units: tuple[Unit, ...]

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(job for unit in self.units for job in unit.jobs)

    @property
    def settings(self) -> Settings:
        """Of its first job; the source's are those of every job."""
        return self.jobs[0].settings


def together(jobs: Sequence[Job]) -> Settings:
    """The settings of several jobs of one edit, as those of one run with all of their targets."""
    return jobs[0].settings.with_values(targets=tuple(job.target for job in jobs))


def groups_of(jobs: Iterable[Job], at_once: int, stamp: str) -> tuple[list[Group], dict[str, str]]:
    """The groups of some jobs, in the order of their first ones, and by name the jobs whose picture cannot be read.

    Args:
        at_once: targets of a unit, at most.
        stamp: of the model, from :func:`model_stamp`.
    """
    by_source: dict[str, list[Job]] = {}
    unreadable: dict[str, str] = {}
    pictures: dict[str, str] = {}
    classes: dict[str, Any] = {}
    for job in jobs:
        settings = job.settings
        try:
            picture = "" if settings.image is None else _file_digest(settings.image, pictures)
        except InputError as error:
            unreadable[job.name] = str(error)
            continue
        of_source = settings.model_dump(exclude={*OF_THE_EDIT, *_OF_NEITHER})
        by_source.setdefault(_digest([of_source, picture, stamp]), []).append(job)
    groups = []
    for digest, members in by_source.items():
        by_edit: dict[str, list[Job]] = {}
        for job in members:
            of_edit = job.settings.model_dump(include={*OF_THE_EDIT} - {"targets"})
            by_edit.setdefault(_digest([of_edit, *_files_of(job.settings, classes)]), []).append(job)
        units = [
            Unit(tuple(chunk), _digest([digest, edit, [_named(job, pictures) for job in chunk]]))
            for edit, same in by_edit.items()
            for chunk in (same[start : start + at_once] for start in range(0, len(same), at_once))
        ]
        groups.append(Group(f"{_slug(members[0].settings)}-{digest[:8]}", tuple(units)))
    return groups, unreadable


def model_stamp(model: str) -> str:
    """What tells whether a model is still the one that it was: its place, and the sizes and dates of its files."""
    source = find_model(model)
    location = Path(source.location)
    if source.kind == "hub":
        return source.location
    files = [location] if location.is_file() else sorted(path for path in location.rglob("*") if path.is_file())
    return _digest([[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files])


def _named(job: Job, pictures: dict[str, str]) -> list[Any]:
    """What of a job decides its output beside source and edit."""
    mask = job.mask if not isinstance(job.mask, str) else _mask_digest(job.mask, pictures)
    return [job.name, job.target, mask]


def _files_of(settings: Settings, classes: dict[str, Any]) -> list[Any]:
    """What decides an edit beside its settings: files that these name, a mask's or a class's, may become others."""
    method = settings.method
    if method not in classes:
        try:
            classes[method] = edit_class(method)
        except ValueError:  # said where the edit is made
            classes[method] = {}
    return [each for each in (classes[method], option_files(settings.options)) if each]


def _mask_digest(path: str, digests: dict[str, str]) -> str:
    try:
        return _file_digest(path, digests)
    except InputError:  # said where the mask is read
        return path


def _file_digest(path: str, digests: dict[str, str]) -> str:
    if path not in digests:
        try:
            digests[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"cannot read '{path}': {error.strerror or error}; pass its folder by --images") from error
    return digests[path]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _slug(settings: Settings) -> str:
    text = Path(settings.image).stem if settings.image else settings.source
    return re.sub(r"[^\w]+", "-", text).strip("-")[:48] or "source"
