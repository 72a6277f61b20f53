"""What the page has a server do: generate, invert a photo, edit it from its recording, look inside, compare."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..errors import InputError, Lacking, RequestWarning, refusals
from ..models.quiet import only_errors
from ..models.served_families import FAMILIES, family_of
from ..runs import run as runs
from ..runs.heat import look_into
from ..runs.making import Loaded, cut_prompts, edit_of, pinned, solver_of_pictures
from ..runs.progress import show_steps
from ..runs.recorded import Recorded, edited, invert_and_record, record_source, wide_edits
from ..runs.repeatable import Clock
from ..runs.settings import Settings
from .models import Models
from .prompts import words_of
from .visitors import Inverted, Look, Result, Visitor
from .watched import Watched

__all__ = ["edit_photo", "generate", "invert_photo", "look_inside"]

#: Scores of self-attention that are shown: one a colour.
COMPONENTS = 3


def generate(models: Models, visitor: Visitor, settings: Settings, watched: Watched) -> Result:
    """Make the images of some settings, and keep them with the visitor."""
    begun = watched.seconds
    with models.use(settings.model, watched) as loaded, _told_as_errors():
        size = settings.size[::-1] if settings.size else loaded.pipe.native_size
        on_step = functools.partial(watched.on_step, size=size)
        run = runs.execute(settings, progress=watched, loaded=loaded, on_step=on_step)
        cut = cut_prompts(loaded.pipe, settings)
    return visitor.keep(run, settings.model, watched.seconds - begun, cut)


def invert_photo(models: Models, visitor: Visitor, settings: Settings, watched: Watched) -> Inverted:
    """Find a photo's noise and record the way back, once for any number of edits; the visitor keeps it.

    Raises:
        InputError: settings that cannot be served; another photo was dropped meanwhile.
    """
    begun = watched.seconds
    settings.check()
    visitor.inverted = visitor.look = None
    with _at_work(models, settings, watched) as loaded:
        recorded = invert_and_record(loaded.pipe, settings, watched, placement=_placement(loaded.pipe))
    if settings.image != str(visitor.photo):
        raise InputError("another photo was dropped meanwhile: press Invert for it")
    visitor.inverted = Inverted(_of(settings), recorded, watched.seconds - begun)
    return visitor.inverted


def edit_photo(models: Models, visitor: Visitor, settings: Settings, watched: Watched) -> Result:
    """Edit the visitor's photo from its recording: the source is not denoised again.

    An edit that needs what was not recorded has it recorded first, which the progress says.

    Raises:
        InputError: no photo was inverted for these settings.
    """
    begun = watched.seconds
    settings.check()
    inverted = visitor.inverted
    if inverted is None or inverted.of != _of(settings):
        what = "the photo is not inverted yet" if inverted is None else "the photo was inverted with other settings"
        raise InputError(f"{what}: press Invert (model, prompt of the photo, steps and guidance belong to it)")
    with _at_work(models, settings, watched) as loaded:
        recorded = inverted.recorded
        try:
            run = edited(loaded, settings, recorded, watched, Clock())
        except Lacking:
            recorded = _recorded_again(loaded.pipe, settings, recorded, watched)
            run = edited(loaded, settings, recorded, watched, Clock())
        cut = cut_prompts(loaded.pipe, settings)
    if visitor.inverted is inverted:  # no other photo was dropped meanwhile
        visitor.inverted = replace(inverted, recorded=recorded)
    return visitor.keep(run, settings.model, watched.seconds - begun, cut)


def _recorded_again(pipe: Any, settings: Settings, recorded: Recorded, watched: Watched) -> Recorded:
    """The same picture, with what the settings' edit needs of it as well."""
    edits = [*wide_edits(pipe, settings), edit_of(pipe, settings, *recorded.cut.size)]
    show_steps(pipe, f"record the way back again, for {settings.method}", watched)
    options = {"inversion": recorded.inversion, "placement": _placement(pipe)}
    return replace(recorded, recording=record_source(pipe, settings, edits, **options))


def _placement(pipe: Any) -> str:
    return "cpu" if str(pipe.device) == "cpu" else "device"


def look_inside(models: Models, visitor: Visitor, result: Result, watched: Watched) -> Look:
    """Make a result once more and read its maps; the visitor keeps what was read.

    Raises:
        InputError: maps that take too much memory, words that were cut off.
    """
    settings = result.run.settings.with_values(model=result.model)  # as the inversion of its photo calls it
    words = words_of([settings.source, *settings.targets])
    visitor.look = None
    inverted = visitor.inverted
    with models.use(settings.model, watched) as loaded, _told_as_errors():
        if settings.image is not None and inverted is not None and inverted.of == _of(settings):
            loaded = replace(loaded, inversion=inverted.recorded.inversion)
        components = COMPONENTS if FAMILIES[family_of(loaded.pipe)].is_unet else 0
        maps, run = look_into(settings, loaded, words, watched, components)
    visitor.look = Look(maps, tuple(words), (run.source, *run.edited))
    return visitor.look


@contextmanager
def _at_work(models: Models, settings: Settings, watched: Watched) -> Iterator[Loaded]:
    """A twin of a loaded model on the solver that pictures are inverted with, in pinned arithmetic."""
    pinning = pinned(settings, models.device)
    with models.use(settings.model, watched) as loaded, only_errors(), pinning, _told_as_errors():
        loaded.pipe.scheduler = solver_of_pictures(loaded.pipe)
        yield loaded


@contextmanager
def _told_as_errors() -> Iterator[None]:
    """What a page cannot show as a warning of the terminal: words that a model does not know stay warnings there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RequestWarning)
        with refusals():
            yield


def _of(settings: Settings) -> tuple[object, ...]:
    """What an inversion and its recording belong to."""
    null_text = (settings.inner_steps, settings.early_stop) if settings.inversion == "null-text" else ()
    return (
        settings.model, settings.image, settings.source, settings.negative, settings.steps, settings.guidance,
        settings.inversion, *null_text,
    )  # fmt: skip
