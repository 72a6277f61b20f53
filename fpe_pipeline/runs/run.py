"""One editing run, of a generated or a real image: its execution, and the record from which it can be repeated.

`execute` turns settings into images. `write` puts the images, a side-by-side picture and `run.json` into a folder, all
or nothing; each picture holds the record too. `read_record` gives the settings back; executing them again on the same
machine with the same versions and threads gives the same images, bit for bit, and elsewhere the same to rounding;
:mod:`fpe_pipeline.runs.agreement` says how far they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_folder import staged
from ..errors import InputError
from ..images.distance import distance, pixel_hash
from ..images.side_by_side import side_by_side
from ..models.loading import identity, pick_device, pick_dtype
from ..models.quiet import only_errors
from ..models.sources import find_model, replaced_models
from .loading import load_pipeline, pipeline_class
from .making import Loaded, made_by, pinned
from .picture_record import PHOTO, is_picture, picture_text, png_info, with_photo_beside
from .progress import Progress
from .repeatable import Clock
from .result import RECORD_FORMAT, Run
from .settings import Settings

if TYPE_CHECKING:
    from ..pipelines.free_prompt import FreePromptPipeline

__all__ = [
    "Loaded",
    "Run",
    "Settings",
    "at_work",
    "execute",
    "photo_of",
    "pixel_hash",
    "read_record",
    "with_its_model",
    "write",
]


def execute(
    settings: Settings,
    *,
    progress: Progress | None = None,
    name: str = "",
    expected_model: str | None = None,
    expected_photo: str | None = None,
    loaded: Loaded | None = None,
    on_step: Callable[..., dict[str, Any]] | None = None,
) -> Run:
    """Make the images of a run: the source and its edits, and each target without control.

    Args:
        settings: checked here before weights are read.
        progress: is told how far each stage has come.
        name: of the run, which stands before those of its stages.
        expected_model: identity that the loaded model must have, as an earlier record gives it.
        expected_photo: pixel hash that the real image must have, cut for the model.
        loaded: a model that is in memory already.
        on_step: diffusers' ``callback_on_step_end`` of the edit.

    Returns:
        A `Run`. Its settings have device, dtype, size and threads filled in, so that they repeat this very run.

    Raises:
        InputError: the settings cannot be served, or the model is not the expected one.
    """
    pipeline_class()  # so that its imports do not count as loading the model

    settings.check()
    clock = Clock()
    with at_work(settings, loaded, clock) as held:
        return made_by(settings, held, progress or Progress(), name, (expected_model, expected_photo), clock, on_step)


@contextmanager
def at_work(settings: Settings, loaded: Loaded | None = None, clock: Clock | None = None) -> Iterator[Loaded]:
    """The model of checked settings, in pinned arithmetic; its scheduler and its bars are put back afterwards.

    Args:
        loaded: a model that is in memory already.
        clock: is told how long it took to load another.

    Raises:
        InputError: it cannot be loaded.
    """
    device = pick_device(settings.device)
    with only_errors(), pinned(settings, device):
        if loaded is None:
            location = find_model(settings.model)
            with (clock or Clock()).measure("load"):
                made: FreePromptPipeline = load_pipeline(
                    location, dtype=pick_dtype(settings.dtype, device, location), device=device
                )
            loaded = Loaded(made, identity(made))
        pipe = loaded.pipe
        scheduler = pipe.scheduler
        try:
            yield loaded
        finally:
            pipe.scheduler = scheduler
            pipe.__dict__.pop("progress_bar", None)


def write(run: Run, directory: Path) -> list[Path]:
    """Write images, `comparison.png` and `run.json` into `directory`; files of the same names are replaced.

    Everything is written beside its destination first and then renamed, `run.json` last: an error leaves no partial
    file.

    Returns:
        The paths, `comparison.png` first and `run.json` last.
    """
    reconstruction = "" if run.photo is None else f"reconstruction, {distance(run.photo, run.source).psnr:.1f} dB"
    comparison = side_by_side(run.comparisons(), edit_label=run.edit_label, reconstruction_label=reconstruction)
    images = {"comparison.png": comparison}
    images |= {name: image for name, (image, _, _) in run.files().items()}
    # A file name that is no UTF-8 has lone surrogates for its bytes; as escapes they are JSON.
    record = run.record()
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with staged(directory) as stage:
        for name, image in images.items():
            image.save(stage / name, format="PNG", pnginfo=png_info(record, name))
        (stage / "run.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    return [directory / name for name in (*images, "run.json")]


def read_record(path: Path) -> tuple[Settings, dict[str, Any]]:
    """Settings and whole record of a `run.json`, or of a picture that `write` wrote.

    Raises:
        InputError: no such file, not a record, or a record of a newer format.
    """
    try:
        text = picture_text(path) if is_picture(path) else path.read_text(encoding="utf-8")
        record = json.loads(text)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"cannot read '{path}': {error.strerror or error}; pass the run.json of an earlier run"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"'{path}' is no text and no PNG: a picture in another format keeps no record; pass the PNG as fpe wrote "
            "it, or the run.json beside it"
        ) from error
    except (ValueError, RecursionError) as error:  # no JSON, or lists in lists without an end
        raise InputError(f"'{path}' is not a run record: {error}; pass the run.json of an earlier run") from error
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise InputError(
            f"expected a run record of format {RECORD_FORMAT}, '{path}' has {found}; make it with fpe edit"
        )
    try:
        record = with_photo_beside(record, path)
        settings = Settings(**record.get("settings", {}))
    except (InputError, TypeError) as error:
        raise InputError(f"'{path}' does not hold settings of this version: {error}; make it with fpe edit") from error
    _check_parts(record, path)
    return settings, record


def _check_parts(record: dict[str, Any], path: Path) -> None:
    """Raise InputError where a record says beside its settings too little to repeat and compare its run, or nonsense:
    whoever wrote a file by hand, or sent one to a page, may have written anything."""
    model = record.get("model")
    wrong = [] if isinstance(model, dict) and isinstance(model.get("identity_sha256"), str) else ["model"]
    wrong += [part for part in ("images", "versions", "machine") if not isinstance(record.get(part, {}), dict)]
    if "images" not in wrong and not all(isinstance(image, dict) for image in record.get("images", {}).values()):
        wrong.append("images")
    if wrong:
        raise InputError(
            f"'{path}' is not the whole record of a run: what it says of its {' and '.join(wrong)} is missing or "
            "damaged; make it with fpe edit"
        )


def with_its_model(settings: Settings, record: dict[str, Any]) -> Settings:
    """Settings of a record, with the weights that it was made with where the embedded model has been replaced since.

    Each candidate is loaded in the record's dtype, as identities of other dtypes differ; where none is the record's,
    the settings stay as they are.

    Raises:
        InputError: a model that cannot be found or read.
    """
    earlier = replaced_models(settings.model)
    if not earlier:
        return settings
    dtype, wanted = pick_dtype(record["settings"].get("dtype", "auto"), "cpu"), record["model"]["identity_sha256"]
    for model in (settings.model, *earlier):
        if identity(load_pipeline(find_model(model), dtype=dtype, device="cpu")) == wanted:
            return settings.with_values(model=model)
    return settings


def photo_of(record: dict[str, Any]) -> str | None:
    """Pixel hash of the real image that a record's run was given; None where its source was generated."""
    return record.get("images", {}).get(PHOTO, {}).get("pixels_sha256")
