"""What the page has a server do: generate, invert a photo, edit it from its recording, look inside, compare."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from ..edits import Edit, FreePromptEdit
from ..edits.registry import make_edit
from ..errors import EditWarning, InputError, RequestWarning
from ..heatmaps.heat_maps import heat_maps
from ..images.distance import distance
from ..models.quiet import only_errors
from ..runs import run as runs
from ..runs.making import Loaded, details_of, edit_of, filled_in, invert, photo_for, pinned, solver_of_pictures
from ..runs.progress import show_steps
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
        run = runs.execute(settings, progress=watched, loaded=loaded, on_step=watched.on_step)
    return visitor.keep(run, settings.model, watched.seconds - begun)


def invert_photo(models: Models, visitor: Visitor, settings: Settings, watched: Watched) -> Inverted:
    """Find a photo's noise and record the way back, once for any number of edits; the visitor keeps it.

    Raises:
        InputError: settings that cannot be served.
    """
    begun = watched.seconds
    settings.check()
    visitor.inverted = visitor.look = None
    with _at_work(models, settings, watched) as loaded:
        pipe = loaded.pipe
        cut = photo_for(pipe, settings)
        assert cut is not None
        show_steps(pipe, "invert the photo", watched)
        inversion = invert(pipe, cut, settings)
        recording = _record(pipe, settings, inversion, _wide_edits(pipe, settings), watched)
        back = _decoded(pipe, recording.latents[-1])
    visitor.inverted = Inverted(
        _of(settings), inversion, recording, cut, back, distance(cut, back).psnr, watched.seconds - begun
    )
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
        pipe = loaded.pipe
        edit = edit_of(pipe, settings, *inverted.cut.size)
        show_steps(pipe, "edit from the recording", watched)
        try:
            made = pipe.edit(inverted.recording, list(settings.targets), edit=edit, backend=settings.backend)
        except ValueError as error:
            if not str(error).startswith("the recording lacks"):
                raise InputError(str(error)) from error
            edits = [*_wide_edits(pipe, settings), edit]
            recording = _record(pipe, settings, inverted.inversion, edits, watched, f" again, for {settings.method}")
            inverted = replace(inverted, recording=recording)
            show_steps(pipe, "edit from the recording", watched)
            made = pipe.edit(recording, list(settings.targets), edit=edit, backend=settings.backend)
        plain = None
        if settings.control:
            show_steps(pipe, "no control", watched)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EditWarning)  # to do nothing is what it is for
                free = pipe.edit(inverted.recording, list(settings.targets), edit=FreePromptEdit(0.0))
            plain = tuple(free.images)
        filled = filled_in(settings, pipe, inverted.cut.size)
        seconds = {"edit": round(watched.seconds - begun, 3)}
        details = details_of(filled, loaded, seconds)
    visitor.inverted = inverted
    run = runs.Run(filled, inverted.back, tuple(made.images), plain, details, inverted.cut, made.report)
    return visitor.keep(run, settings.model, watched.seconds - begun)


def look_inside(models: Models, visitor: Visitor, result: Result, watched: Watched) -> Look:
    """Make a result once more and read its maps; the visitor keeps what was read.

    Raises:
        InputError: maps that take too much memory, words that were cut off.
    """
    settings = result.run.settings
    words = words_of([settings.source, *settings.targets])
    visitor.look = None
    inverted = visitor.inverted
    with models.use(settings.model, watched) as loaded, _told_as_errors():
        if settings.image is not None and inverted is not None and inverted.of == _of(settings):
            loaded = replace(loaded, inversion=inverted.inversion)
        with heat_maps(loaded.pipe, words, components=COMPONENTS) as maps:
            run = runs.execute(settings.with_values(control=False), progress=watched, loaded=loaded)
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
        try:
            yield
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from error


def _of(settings: Settings) -> tuple[object, ...]:
    """What an inversion and its recording belong to."""
    null_text = (settings.inner_steps, settings.early_stop) if settings.inversion == "null-text" else ()
    return (
        settings.model, settings.image, settings.source, settings.negative, settings.steps, settings.guidance,
        settings.inversion, *null_text,
    )  # fmt: skip


def _wide_edits(pipe: Any, settings: Settings) -> list[Edit]:
    """What is recorded before anybody knows the targets: every step of Free-Prompt-Editing and Prompt-to-Prompt."""
    twice = [settings.source, settings.source]
    edits = [make_edit("fpe", twice, pipe.tokenizer, pipe, self_replace_steps=1.0)]
    if settings.source.strip():
        whole = {"cross_replace_steps": 1.0, "self_replace_steps": 1.0}
        edits.append(make_edit("p2p-replace", twice, pipe.tokenizer, pipe, **whole))
    return edits


def _record(pipe: Any, settings: Settings, inversion: Any, edits: list[Edit], watched: Watched, why: str = "") -> Any:
    show_steps(pipe, f"record the way back{why}", watched)
    try:
        return pipe.record(
            settings.source,
            edit=edits,
            inversion=inversion,
            guidance_scale=settings.guidance,
            negative_prompt=settings.negative,
            placement="cpu" if str(pipe.device) == "cpu" else "device",
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _decoded(pipe: Any, latent: torch.Tensor) -> Image.Image:
    with torch.no_grad():
        pixels = pipe.vae.decode(latent.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")[0]
