"""A recorded picture in a folder: what `fpe invert` writes and `fpe edit --recording` edits.

====================  ==============================================================================
file                  holds
====================  ==============================================================================
``photo.png``         the picture as it was cut for the model
``source.png``        the picture as it came back
``recording/``        the way back, as :class:`~fpe_pipeline.recordings.recording.Recording` lies in a folder
``run.json``          the record, written last: where it is, the rest is whole
====================  ==============================================================================

The folder may be moved: its picture is the one beside the record.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..atomic_folder import check_writable, staged
from ..errors import InputError, Lacking, refusals
from ..models.sources import find_model
from .making import details_of, filled_in, solver_of_pictures
from .model_defaults import check_family
from .picture_record import PHOTO, png_info
from .progress import Progress
from .recorded import Recorded, edited, invert_and_record, wide_edits
from .repeatable import Clock
from .result import Run
from .run import at_work, pixel_hash, read_record
from .settings import Settings

if TYPE_CHECKING:
    from ..edits import Edit

__all__ = ["OF_THE_SOURCE", "RECORDING", "Kept", "check_new", "edit_from", "read_recorded", "record_into"]

#: The folder's own folder.
RECORDING = "recording"
_SOURCE, _RECORD = "source.png", "run.json"
#: Settings that a recording was made with, and that an edit from it therefore has.
OF_THE_SOURCE = (
    "source", "image", "negative", "inversion", "inversion_guidance", "inner_steps", "early_stop", "seed", "steps",
    "guidance", "size", "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """What was recorded.

    Args:
        paths: of the files, the record's last.
        psnr: of the picture as it came back, dB.
        nbytes: of the recording.
        record: as ``run.json`` has it.
    """

    paths: list[Path]
    psnr: float
    nbytes: int
    record: dict[str, Any]


def check_new(folder: Path, settings: Settings, methods: Sequence[str], precision: str) -> None:
    """Check, before weights are read, that a picture can be recorded into a folder for some methods.

    Raises:
        InputError: a folder that holds a recording or cannot be written, an unknown precision, a method that the model
            does not have.
    """
    from ..edits.registry import find_method
    from ..recordings.folder_store import INDEX
    from ..recordings.precision import PRECISIONS

    if precision not in PRECISIONS:
        raise InputError(f"--precision is one of {', '.join(PRECISIONS)}, got '{precision}'")
    source = find_model(settings.model)
    for method in methods:
        with refusals():
            find_method(method)
        check_family(settings.with_values(method=method), source)
    taken = [name for name in (RECORDING, _RECORD) if (folder / name).exists()]
    if taken == [RECORDING] and not (folder / RECORDING / INDEX).exists():
        raise InputError(
            f"'{folder / RECORDING}' is a recording that was not finished, as another command writes it or as one left "
            "it that was killed; delete it, or pass a new folder with -o"
        )
    if taken:
        raise InputError(f"'{folder}' holds {' and '.join(taken)} already; pass a new folder with -o")
    check_writable(folder)


def record_into(
    folder: Path, settings: Settings, progress: Progress, *, methods: Sequence[str] = (), precision: str = "exact"
) -> Kept:
    """Invert the settings' picture, record its way back and write both, all or nothing.

    Args:
        folder: new, or without a recording; checked by :func:`check_new`.
        settings: checked as a source's.
        methods: whose edits the recording is to serve, with their defaults; default: those of
            :func:`~.recorded.wide_edits`.
        precision: of the recording.

    Raises:
        InputError: settings that cannot be served, or a method that needs to know its targets.
    """
    clock, place = Clock(), folder / RECORDING
    with at_work(settings, clock=clock) as loaded:
        pipe = loaded.pipe
        pipe.set_progress_bar_config(disable=True)  # what the recording takes is said by the caller
        edits = [_edit_for(method, pipe, settings) for method in methods] or wide_edits(pipe, settings)
        options: dict[str, Any] = {"placement": place, "precision": precision}
        made = invert_and_record(pipe, settings, progress, edits=edits, clock=clock, **options)
        filled = filled_in(settings, pipe, made.cut.size)
        run = Run(filled, made.back, (), None, details_of(filled, loaded, clock.seconds), made.cut)
    record = run.record() | {"recording": RECORDING, "psnr": made.psnr}
    try:
        with staged(folder) as stage:
            for name, (image, _, _) in run.files().items():
                image.save(stage / name, pnginfo=png_info(record, name))
            text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            (stage / _RECORD).write_text(text, encoding="utf-8", errors="backslashreplace")
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    paths = [folder / name for name in (*run.files(), RECORDING, _RECORD)]
    return Kept(paths, made.psnr, made.recording.nbytes, record)


def read_recorded(folder: Path) -> tuple[Settings, dict[str, Any]]:
    """Settings, without targets, and record of a folder; its picture is the one that lies there.

    Raises:
        InputError: no folder of a recording, or one of which something is missing or was changed.
    """
    if not (folder / RECORDING).is_dir() or not (folder / _RECORD).is_file():
        raise InputError(f"'{folder}' holds no recorded picture; make one with fpe invert PICTURE -o '{folder}'")
    settings, record = read_record(folder / _RECORD)
    try:
        with Image.open(folder / PHOTO) as photo:
            digest, size = pixel_hash(photo), photo.size
    except (OSError, SyntaxError) as error:
        raise InputError(f"cannot read '{folder / PHOTO}': {error}; invert the picture again") from error
    if digest != record.get("images", {}).get(PHOTO, {}).get("pixels_sha256"):
        raise InputError(f"'{folder / PHOTO}' is not the picture that was recorded; invert it again")
    return settings.with_values(image=str((folder / PHOTO).resolve()), size=size, targets=()), record


def edit_from(folder: Path, settings: Settings, progress: Progress) -> Run:
    """Edit a recorded picture; its source is not denoised again.

    Args:
        settings: those of :func:`read_recorded` with targets and an edit; checked.

    Raises:
        InputError: a recording of another model or one that holds less than the edit needs.
    """
    from ..recordings.recording import Recording

    clock = Clock()
    recording = Recording.load(folder / RECORDING)
    with Image.open(folder / PHOTO) as cut, Image.open(folder / _SOURCE) as back:
        recorded = Recorded(recording, cut.convert("RGB"), back.convert("RGB"))
    with at_work(settings, clock=clock) as loaded:
        loaded.pipe.scheduler = solver_of_pictures(loaded.pipe)
        try:
            return edited(loaded, settings, recorded, progress, clock)
        except Lacking as error:
            raise InputError(
                f"{error.what}; record it with fpe invert --method {settings.method}, or give the edit fewer steps or "
                "layers"
            ) from error


def _edit_for(method: str, pipe: Any, settings: Settings) -> Edit:
    """A method's edit before its targets are known."""
    from ..edits.registry import make_edit

    try:
        return make_edit(method, [settings.source, settings.source], pipe.tokenizer, pipe)
    except (TypeError, ValueError) as error:
        raise InputError(f"{method} cannot be recorded for before its targets are known: {error}") from error
