"""Making one group's pictures, by a model that is loaded once for all of them.

What comes of a job is its picture's file as bytes: whoever asked writes it, so that a disk is written to in one place
and workers on other machines need none of ours.
"""

from __future__ import annotations

import io
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ..errors import EditWarning, InputError, RequestWarning
from ..images.distance import pixel_hash
from ..models.loading import identity, pick_device, pick_dtype
from ..models.quiet import only_errors
from ..models.sources import find_model
from ..runs import run as runs
from ..runs.loading import load_pipeline
from ..runs.making import Loaded, details_of, edit_of, filled_in, invert, photo_for, pinned, solver_of_pictures
from ..runs.picture_record import PHOTO, png_info
from ..runs.recorded import check_recordable, record_source, source_of
from ..runs.settings import Settings
from .encoders import Encoders
from .jobs import Job
from .masks import mask_for
from .measures import measures
from .plan import Group, Unit
from .request import Weights

__all__ = ["SOURCE", "SOURCES", "Failed", "Made", "Maker", "Outcome"]

logger = logging.getLogger(__name__)

#: The file of a group's source; of a real image, of what came back from its inversion.
SOURCE = "source.png"
#: Files that a group has beside its jobs'.
SOURCES = (SOURCE, PHOTO)


@dataclass(frozen=True)
class Made:
    """A picture.

    Args:
        name: of the job, or of the source's file.
        png: its file.
        pixels: their hash.
        measures: of an edit, by name; {} of a source.
        seconds: that its unit took, shared by the unit's jobs.
    """

    name: str
    png: bytes
    pixels: str
    measures: dict[str, float | None]
    seconds: float = 0.0


@dataclass(frozen=True)
class Failed:
    """A job of which nothing came, and why."""

    name: str
    reason: str


Outcome = Made | Failed


@dataclass(frozen=True)
class _Source:
    """A group's source at work: its size, its recording or how it is made beside each unit, its pictures."""

    loaded: Loaded
    settings: Settings
    photo: Image.Image | None
    size: tuple[int, int]
    recording: Any = None
    image: Image.Image | None = None


class Maker:
    """A model in memory, and the encoders of measures; makes groups.

    Args:
        settings: of any job, for model, device, dtype and threads, which all of a batch share.
        weights: of measures.

    Raises:
        InputError: a model or weights that cannot be loaded.
    """

    def __init__(self, settings: Settings, weights: Weights) -> None:
        self.device = pick_device(settings.device)
        with only_errors():
            source = find_model(settings.model)
            dtype = pick_dtype(settings.dtype, self.device, source)
            pipe = load_pipeline(source, dtype=dtype, device=self.device)
            pipe.set_progress_bar_config(disable=True)
            self.loaded = Loaded(pipe, identity(pipe))
            self.encoders = Encoders(weights, self.device)

    def make(self, group: Group, wanted: frozenset[str], sources: bool = True) -> Iterator[Outcome]:
        """What comes of a group's jobs, a unit at a time.

        Args:
            group: whole, whatever of it is wanted: units are composed of it.
            wanted: names of the jobs to make; each brings its unit with it.
            sources: also yield the source's files.
        """
        pipe = self.loaded.pipe
        scheduler = pipe.scheduler
        with only_errors(), pinned(group.settings, self.device), warnings.catch_warnings():
            warnings.simplefilter("ignore", EditWarning)
            warnings.simplefilter("once", RequestWarning)  # of the list, not of each of its jobs
            try:
                yield from self._make(group, wanted, sources)
            finally:
                pipe.scheduler = scheduler

    def _make(self, group: Group, wanted: frozenset[str], sources: bool) -> Iterator[Outcome]:
        refused: dict[str, str] = {}
        try:
            source = self._source(group.settings)
            masks, refused = self._checked(group.jobs, source)
            yield from (Failed(name, reason) for name, reason in refused.items() if name in wanted)
            units = [
                replace(unit, jobs=kept)
                for unit in group.units
                if (kept := tuple(job for job in unit.jobs if job.name not in refused))
            ]
            if len(units) > 1:
                source = self._recorded(source, units)
        except Exception as error:
            left = wanted - refused.keys()
            yield from (Failed(job.name, _reason(error)) for job in group.jobs if job.name in left)
            return
        for unit in units:
            if not sources and not any(job.name in wanted for job in unit.jobs):
                continue
            for outcome in self._unit(unit, source, masks, sources):
                is_source = outcome.name in SOURCES
                if outcome.name in wanted or is_source:
                    yield outcome
                sources = sources and not is_source

    def _source(self, settings: Settings) -> _Source:
        """A group's source before anything is denoised with it; a picture is inverted here."""
        settings.check_source()  # of a first job whose edit makes no sense, the source may still be another job's
        pipe = self.loaded.pipe
        photo = photo_for(pipe, settings)
        if photo is None:
            return _Source(self.loaded, settings, None, settings.size or pipe.native_size[::-1])
        scheduler = pipe.scheduler
        inversion = invert(pipe, photo, settings)
        pipe.scheduler = scheduler
        return _Source(replace(self.loaded, inversion=inversion), settings, photo, photo.size)

    def _checked(self, jobs: Sequence[Job], source: _Source) -> tuple[dict[str, Any], dict[str, str]]:
        """Masks by job, and by job why it cannot be made: what is about one target costs no other one anything."""
        masks: dict[str, Any] = {}
        refused: dict[str, str] = {}
        for job in jobs:
            try:
                # The picture is the group's, and was looked at once.
                job.settings.with_values(image=None, source=job.settings.source or "a picture").check()
                edit_of(self.loaded.pipe, job.settings, *source.size)
                masks[job.name] = None if job.mask is None else mask_for(job.mask, source.size)
            except Exception as error:
                refused[job.name] = _reason(error)
        return masks, refused

    def _recorded(self, source: _Source, units: Sequence[Unit]) -> _Source:
        """The source recorded for all units, where model and scheduler let it; else it is made beside each of them."""
        pipe, settings = self.loaded.pipe, source.settings
        if source.photo is None:
            try:
                check_recordable(pipe)
            except ValueError as error:
                logger.warning("the source is made again for every unit: %s", error)
                return source
        import torch

        scheduler = pipe.scheduler
        options: dict[str, Any] = {"inversion": source.loaded.inversion}
        if source.photo is None:
            options = {
                "generator": torch.Generator().manual_seed(settings.seed),
                "width": source.size[0],
                "height": source.size[1],
                "num_inference_steps": settings.steps,
            }
        else:
            pipe.scheduler = solver_of_pictures(pipe)
        try:
            edits = [edit_of(pipe, unit.settings, *source.size) for unit in units]
            recording = record_source(pipe, settings, edits, **options)
            return replace(source, recording=recording, image=source_of(pipe, recording, source.size))
        except InputError as error:  # edits of what a recording of this model does not hold
            logger.warning("the source is made again for every unit: %s", error)
            return source
        finally:
            pipe.scheduler = scheduler

    def _unit(self, unit: Unit, source: _Source, masks: dict[str, Any], sources: bool) -> Iterator[Outcome]:
        """The pictures of a unit; where it fails as a whole, those of its jobs one by one."""
        begun = time.monotonic()
        try:
            run = self._run(unit.settings, source)
        except Exception as error:
            if len(unit.jobs) == 1:
                yield Failed(unit.jobs[0].name, _reason(error))
                return
            logger.warning("%d jobs failed together (%s) and are tried one by one", len(unit.jobs), _reason(error))
            for job in unit.jobs:
                outcomes = list(self._unit(replace(unit, jobs=(job,)), source, masks, sources))
                sources = sources and not any(outcome.name in SOURCES for outcome in outcomes)
                yield from outcomes
            return
        seconds = round((time.monotonic() - begun) / len(unit.jobs), 3)
        if sources:
            alone = replace(
                run, settings=run.settings.with_values(targets=(unit.jobs[0].target,)), edited=run.edited[:1]
            )
            for name, (image, role, _) in alone.files().items():
                if role != "edited":
                    yield Made(name, _png(alone, name, image), pixel_hash(image), {})
        for job, image in zip(unit.jobs, run.edited, strict=True):
            try:
                # Of its own run: `fpe edit --from` repeats this picture and no other.
                alone = replace(run, settings=run.settings.with_values(targets=(job.target,)), edited=(image,))
                before = run.photo or run.source
                found = measures(before, image, masks[job.name])
                found |= self.encoders.measures(before, image, job.settings.source, job.target)
                yield Made(job.name, _png(alone, "target-1.png", image), pixel_hash(image), found, seconds)
            except Exception as error:
                yield Failed(job.name, _reason(error))

    def _run(self, settings: Settings, source: _Source) -> runs.Run:
        if source.recording is None:
            return runs.execute(settings, loaded=source.loaded)
        pipe = self.loaded.pipe
        scheduler = pipe.scheduler
        if source.photo is not None:
            pipe.scheduler = solver_of_pictures(pipe)
        try:
            edit = edit_of(pipe, settings, *source.size)
            made = pipe.edit(source.recording, list(settings.targets), edit=edit, backend=settings.backend)
        finally:
            pipe.scheduler = scheduler
        assert source.image is not None
        filled = filled_in(settings, pipe, source.size)
        details = details_of(filled, source.loaded, {})
        return runs.Run(filled, source.image, tuple(made.images), None, details, source.photo, made.report)


def _png(run: runs.Run, name: str, image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=png_info(run.record(), name))
    return file.getvalue()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
