"""One editing run, of a generated or a real image: its execution, and the record from which it can be repeated.

`execute` turns settings into images. `write` puts the images,
a side-by-side picture and `run.json` into a folder, all or nothing. `read_record` gives the settings back; executing
them again on the same machine with the same versions and threads gives the same images, bit for bit, and elsewhere the
same to rounding; :mod:`fpe_pipeline.runs.agreement` says how far they are.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..atomic_folder import staged
from ..errors import InputError
from ..images.distance import distance, pixel_hash
from ..images.side_by_side import Comparison, side_by_side
from ..models.loading import (
    find_model,
    identity,
    is_embedded,
    pick_device,
    pick_dtype,
    replaced_models,
    scheduler_settings,
)
from ..models.quiet import only_errors
from .drawing import Drawing
from .edit_class import edit_class
from .loading import load_pipeline, pipeline_class
from .progress import Progress
from .repeatable import Clock, machine, repeatable, threads_for, versions
from .settings import Settings

if TYPE_CHECKING:
    from ..pipeline import FreePromptPipeline

__all__ = ["Run", "Settings", "execute", "photo_of", "pixel_hash", "read_record", "with_its_model", "write"]

logger = logging.getLogger(__name__)

RECORD_FORMAT = 1


@dataclass(frozen=True)
class Run:
    """What `execute` made: the images by role and prompt order, and the record that `run.json` will hold.

    `photo` is the real image as it was cut for the model, None where the source was generated; `source` is then what
    came back from its inversion.
    """

    settings: Settings
    source: Image.Image
    edited: tuple[Image.Image, ...]
    uncontrolled: tuple[Image.Image, ...] | None
    details: dict[str, Any] = field(repr=False)
    photo: Image.Image | None = None

    @property
    def edit_label(self) -> str:
        """Title of the edited pictures in a comparison."""
        from ..edits.registry import find_method

        return f"target, {find_method(self.settings.method).title}"

    def comparisons(self) -> list[Comparison]:
        """One row a target, for `pictures.side_by_side`."""
        plain = self.uncontrolled or (None,) * len(self.edited)
        return [
            Comparison(
                self.settings.source,
                prompt,
                self.photo or self.source,
                edited,
                without,
                None if self.photo is None else self.source,
            )
            for prompt, edited, without in zip(self.settings.targets, self.edited, plain, strict=True)
        ]

    def files(self) -> dict[str, tuple[Image.Image, str, str]]:
        """File name to (image, role, prompt), in the order in which they are reported."""
        named = {"source.png": (self.source, "source", self.settings.source)}
        if self.photo is not None:
            named = {
                "photo.png": (self.photo, "photo", self.settings.source),
                "source.png": (self.source, "reconstruction", self.settings.source),
            }
        for number, (prompt, image) in enumerate(zip(self.settings.targets, self.edited, strict=True), start=1):
            named[f"target-{number}.png"] = (image, "edited", prompt)
            if self.uncontrolled is not None:
                named[f"target-{number}-no-control.png"] = (self.uncontrolled[number - 1], "no control", prompt)
        return named

    def record(self) -> dict[str, Any]:
        """The content of `run.json`."""
        return {
            "format": RECORD_FORMAT,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "settings": self.settings.model_dump(),
            **self.details,
            "images": {
                name: {"role": role, "prompt": prompt, "pixels_sha256": pixel_hash(image)}
                for name, (image, role, prompt) in self.files().items()
            },
        }


def execute(
    settings: Settings,
    *,
    progress: Progress | None = None,
    name: str = "",
    expected_model: str | None = None,
    expected_photo: str | None = None,
) -> Run:
    """Make the images of a run: the source and its edits, and each target without control.

    Args:
        settings: checked here before weights are read.
        progress: is told how far each stage has come.
        name: of the run, which stands before those of its stages.
        expected_model: identity that the loaded model must have, as an earlier record gives it.
        expected_photo: pixel hash that the real image must have, cut for the model.

    Returns:
        A `Run`. Its settings have device, dtype, size and threads filled in, so that they repeat this very run.

    Raises:
        InputError: the settings cannot be served, or the model is not the expected one.
    """
    import torch

    pipeline_class()  # so that its imports do not count as loading the model

    progress = progress or Progress()
    location = settings.check()
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    clock = Clock()
    with (
        only_errors(),
        repeatable(threads_for(settings.model, device) if settings.threads is None else settings.threads),
    ):
        with clock.measure("load"):
            pipe: FreePromptPipeline = load_pipeline(location, dtype=dtype, device=device)
        _warn_of_cut_prompts(pipe.tokenizer, settings)
        model = identity(pipe)
        photo = _photo(pipe, settings)
        _check_expected(settings, model, expected_model, photo, expected_photo)
        source, edited, plain = Drawing(pipe, settings, progress, name, clock).pictures(photo)
        settings = settings.with_values(
            model=settings.model if location.kind == "hub" or is_embedded(settings.model) else location.location,
            image=None if settings.image is None else str(Path(settings.image).resolve()),
            size=source.size,
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            threads=torch.get_num_threads(),
        )
        details = _details(pipe, settings, model, clock)
    return Run(settings, source, edited, plain, details, photo)


def _details(pipe: FreePromptPipeline, settings: Settings, model: str, clock: Clock) -> dict[str, Any]:
    """What a record says beside settings and images."""
    from fpe_kernels import backends

    return edit_class(settings.method) | {
        "model": {"identity_sha256": model, "class": type(pipe).__name__, "scheduler": scheduler_settings(pipe)},
        "versions": versions(),
        "machine": machine(settings.device),
        "backends": backends(),
        "seconds": clock.seconds,
    }


def _check_expected(
    settings: Settings, model: str, expected_model: str | None, photo: Image.Image | None, expected_photo: str | None
) -> None:
    """Raise InputError for another model or picture than the record's, where there is one."""
    if expected_model is not None and model != expected_model:
        raise InputError(
            f"model '{settings.model}' is not the one of the record: its weights, scheduler or dtype differ "
            f"({model[:12]}… instead of {expected_model[:12]}…); pass --model to use it all the same"
        )
    if expected_photo is not None and photo is not None and expected_photo != pixel_hash(photo):
        raise InputError(
            f"'{settings.image}' is not the picture of the record: its pixels differ; pass --image to edit "
            "it all the same"
        )


def _warn_of_cut_prompts(tokenizer: Any, settings: Settings) -> None:
    """Say in one line which prompts are longer than the model reads."""
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    prompts = {"source": settings.source, "negative": settings.negative or ""}
    prompts |= {f"target {number}": target for number, target in enumerate(settings.targets, start=1)}
    lengths = {name: len(tokenizer(prompt, add_special_tokens=False).input_ids) for name, prompt in prompts.items()}
    cut = [f"{name} {length}" for name, length in lengths.items() if length > room]
    if cut:
        logger.warning("the model reads the first %d tokens of a prompt and no more: %s", room, ", ".join(cut))


def _photo(pipe: FreePromptPipeline, settings: Settings) -> Image.Image | None:
    """The settings' picture as the model takes it; None where the source is generated."""
    from ..images.load import load_image

    if settings.image is None:
        return None
    pixels = pipe.native_size[0] * pipe.native_size[1]
    return load_image(settings.image, settings.size or (None, None), multiple=pipe.vae_scale_factor, pixels=pixels)


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
    record = json.dumps(run.record(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with staged(directory) as stage:
        for name, image in images.items():
            image.save(stage / name, format="PNG")
        (stage / "run.json").write_text(record, encoding="utf-8", errors="backslashreplace")
    return [directory / name for name in (*images, "run.json")]


def read_record(path: Path) -> tuple[Settings, dict[str, Any]]:
    """Settings and whole record of a `run.json`.

    Raises:
        InputError: no such file, not a record, or a record of a newer format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read '{path}': {error.strerror or error}; pass the run.json of an earlier run"
        ) from error
    except ValueError as error:
        raise InputError(f"'{path}' is not a run record: {error}; pass the run.json of an earlier run") from error
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise InputError(
            f"expected a run record of format {RECORD_FORMAT}, '{path}' has {found}; make it with fpe edit"
        )
    try:
        return Settings(**record.get("settings", {})), record
    except (InputError, TypeError) as error:
        raise InputError(f"'{path}' does not hold settings of this version: {error}; make it with fpe edit") from error


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
    return record.get("images", {}).get("photo.png", {}).get("pixels_sha256")
