"""A batch: what is asked for, what that comes to, and the run of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic_folder import check_writable
from ..errors import InputError
from ..models.loading import pick_device
from ..models.sources import EMBEDDED
from ..runs.progress import Progress
from ..runs.repeatable import threads_for
from ..runs.settings import OF_NULL_TEXT, Settings
from .encoders import check_weights
from .job_files import read_jobs
from .jobs import BadRow, Job
from .making import SOURCES, Failed
from .plan import Group, groups_of, model_stamp
from .request import LOCAL, BatchRequest
from .results import MANIFEST, Results
from .summary import Line, means, write_summary
from .workers import Task, check_ray, outcomes

__all__ = ["Batch", "Finished", "run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What a request comes to, known before any weights are read.

    Args:
        entries: jobs and bad rows, in the order of the list.
        groups: of the jobs whose pictures can be read.
        failed: why, by the name of a job or a row of which nothing will come.
        tasks: what is not there yet.
        results: the folder.
    """

    request: BatchRequest
    entries: list[Job | BadRow]
    groups: list[Group]
    failed: dict[str, str]
    tasks: list[Task]
    results: Results


@dataclass(frozen=True)
class Finished:
    """What came of a batch.

    Args:
        lines: of its jobs and bad rows.
        kept: how many pictures of jobs were there before.
        unwritten: files that could not be written beside jobs', and why.
        paths: of the summary and the manifest.
    """

    lines: list[Line]
    kept: int
    unwritten: dict[str, str]
    paths: list[Path] = field(default_factory=list)

    @property
    def failed(self) -> dict[str, str]:
        """Why, by what is missing."""
        return {line.name: line.failed for line in self.lines if line.failed} | self.unwritten

    def as_json(self) -> dict[str, Any]:
        """The same as JSON has it, without the paths."""
        made = len([line for line in self.lines if not line.failed])
        return {
            "jobs": len(self.lines),
            "made": made - self.kept,
            "kept": self.kept,
            "failed": self.failed,
            "means": means(self.lines),
        }


def plan(request: BatchRequest) -> Batch:
    """Read the list, and look what of it is there already.

    Raises:
        InputError: a list that cannot be read, a folder that cannot be written, weights or packages that are missing.
    """
    if request.workers > 1 or request.cluster != LOCAL:
        check_ray()
    check_weights(request.weights)
    defaults = {**request.defaults, "threads": _threads(request)}
    entries = read_jobs(request.jobs, defaults, request.images)
    check_writable(request.output)
    jobs = [entry for entry in entries if isinstance(entry, Job)]
    _check_optimisation(request, jobs)
    failed = {entry.name: entry.reason for entry in entries if isinstance(entry, BadRow)}
    stamp = model_stamp(request.defaults.get("model", EMBEDDED)) + request.weights.model_dump_json()
    groups, unreadable = groups_of(jobs, request.at_once, stamp)
    results = Results(request.output, groups)
    tasks = []
    for group in groups:
        wanted = frozenset(job.name for job in group.jobs if results.entry(group, job.name) is None)
        sources = any(results.entry(group, name) is None for name in _sources(group.settings))
        if wanted or sources:
            tasks.append(Task(group, wanted, sources))
    return Batch(request, entries, groups, failed | unreadable, tasks, results)


def run(
    request: BatchRequest, progress: Progress | None = None, say: Callable[[str], None] = logger.warning
) -> Finished:
    """Make what a list asks for and is not there yet.

    Args:
        progress: is told how many jobs are done.
        say: is told of each job that failed, as it fails.

    Raises:
        InputError: nothing could be begun.
    """
    batch = plan(request)
    progress = progress or Progress()
    total = len(batch.entries)
    failed, unwritten = dict(batch.failed), dict[str, str]()
    kept = len([job for group in batch.groups for job in group.jobs if batch.results.entry(group, job.name)])
    for name, reason in failed.items():
        say(f"{name} failed: {reason}")
    done = kept + len(failed)
    progress.tell("jobs", done, total)
    if batch.tasks:
        settings = batch.tasks[0].group.settings
        units = {job.name: unit for group in batch.groups for unit in group.units for job in unit.jobs}
        for group, outcome in outcomes(batch.tasks, settings, request.weights, request.workers, request.cluster):
            is_job = outcome.name not in SOURCES
            reason = outcome.reason if isinstance(outcome, Failed) else ""
            if not isinstance(outcome, Failed):
                try:
                    batch.results.keep(group, units.get(outcome.name) if is_job else None, outcome)
                except OSError as error:
                    reason = f"cannot be written: {error.strerror or error}"
            name = outcome.name if is_job else f"{group.folder}/{outcome.name}"
            if reason:
                (failed if is_job else unwritten)[name] = reason
                say(f"{name} failed: {reason}")
            if is_job:
                done += 1
                progress.tell("jobs", done, total)
    return _finished(batch, failed, kept, unwritten, say)


def _check_optimisation(request: BatchRequest, jobs: list[Job]) -> None:
    """Raise InputError for settings of null-text inversion of which no job would make use."""
    if OF_NULL_TEXT & request.defaults.keys() and jobs and not any(job.settings.optimises for job in jobs):
        raise InputError(
            "--inner-steps and --early-stop are null-text inversion's, and the list inverts no picture by it; pass "
            "--inversion null-text as well, or leave them out"
        )


def _finished(
    batch: Batch, failed: dict[str, str], kept: int, unwritten: dict[str, str], say: Callable[[str], None]
) -> Finished:
    lines = _lines(batch, failed)
    finished = Finished(lines, kept, unwritten)
    try:
        batch.results.close()
        finished.paths.extend(write_summary(batch.request.output, lines))
        if batch.results.entries:
            finished.paths.append(batch.request.output / MANIFEST)
    except OSError as error:
        finished.unwritten["summary"] = f"cannot be written: {error.strerror or error}"
        say(f"summary failed: {finished.unwritten['summary']}")
    return finished


def _lines(batch: Batch, failed: dict[str, str]) -> list[Line]:
    places = {job.name: group for group in batch.groups for job in group.jobs}
    lines = []
    for entry in batch.entries:
        if isinstance(entry, BadRow):
            lines.append(Line(entry.name, failed=entry.reason))
            continue
        about: dict[str, Any] = {"kind": entry.kind, "source": entry.settings.source, "target": entry.target}
        kept = batch.results.entry(places[entry.name], entry.name) if entry.name in places else None
        if kept is None:
            lines.append(Line(entry.name, failed=failed.get(entry.name, "nothing came of it"), **about))
        else:
            lines.append(
                Line(entry.name, file=kept["file"], measures=kept["measures"], seconds=kept["seconds"], **about)
            )
    return lines


def _sources(settings: Settings) -> tuple[str, ...]:
    return SOURCES if settings.image is not None else SOURCES[:1]


def _threads(request: BatchRequest) -> int:
    """CPU threads of every worker: said once for all, since sums round by their number."""
    import os

    import torch

    said = request.defaults.get("threads")
    if said is not None:
        return int(said)
    device = request.defaults.get("device", "auto")
    if request.cluster == LOCAL or device == "auto":  # a cluster's own device need not be here
        device = pick_device(device)
    alone = threads_for(request.defaults.get("model", EMBEDDED), device) or torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or request.workers == 1:
        return alone
    return max(1, alone // request.workers)
