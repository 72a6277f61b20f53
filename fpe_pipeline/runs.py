"""One editing run: its settings, its execution, and the record from which it can be repeated.

`Settings` holds everything that decides the images. `execute` turns settings into images. `write` puts the images,
a side-by-side picture and `run.json` into a folder, all or nothing. `read_record` gives the settings back; executing
them again on the same machine with the same versions gives the same images, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from PIL import Image

from .loading import (
    EMBEDDED,
    InputError,
    ModelSource,
    find_model,
    identity,
    load_pipeline,
    pick_device,
    pick_dtype,
    pipeline_class,
    scheduler_settings,
)
from .pictures import Comparison, side_by_side
from .staging import staged

__all__ = ["Run", "Settings", "differences", "execute", "pixel_hash", "read_record", "versions", "write"]

RECORD_FORMAT = 1
SELECTORS = ("levels", "max_tokens", "layers")
EDIT_LABEL = "target, Free-Prompt-Editing"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the images of a run.

    Args:
        source: prompt of the source image.
        targets: one or more prompts to edit it into.
        negative: negative prompt of every image; None is the empty prompt.
        model: "embedded", a folder, a checkpoint file or a hub name.
        seed: of the noise that all images start from; drawn on the CPU, so the same on every device.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 or less switches it off.
        self_replace: (first, last) of the replaced steps, as fractions of all steps.
        levels, max_tokens, layers: at most one, to choose the replaced self-attention layers as `FreePromptEdit`
            does.
        size: (width, height) in pixels; None is the model's own.
        control: also make each target without the edit, to compare.
        backend: attention backend, or "auto".
        dtype: "float32", "float16", "bfloat16" or "auto".
        device: "cpu", "cuda", "cuda:1", "mps" or "auto".
        threads: CPU threads of torch; None leaves torch's choice. Sums may round differently with another number.
    """

    source: str
    targets: tuple[str, ...]
    negative: str | None = None
    model: str = EMBEDDED
    seed: int = 0
    steps: int = 50
    guidance: float = 7.5
    self_replace: tuple[float, float] = (0.0, 0.8)
    levels: tuple[int, ...] | None = None
    max_tokens: int | None = None
    layers: tuple[str | int, ...] | None = None
    size: tuple[int, int] | None = None
    control: bool = True
    backend: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None

    def edit(self):
        """The `FreePromptEdit` of these settings.

        Raises:
            InputError: the window or the layer choice makes no sense.
        """
        from .edits import FreePromptEdit

        try:
            return FreePromptEdit(self.self_replace, levels=self.levels, max_tokens=self.max_tokens, layers=self.layers)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error

    def changed(self, **given: Any) -> Settings:
        """These settings with some replaced; a new choice of layers replaces the old one, of whichever kind."""
        if given.keys() & set(SELECTORS):
            given = dict.fromkeys(SELECTORS) | given
        return dataclasses.replace(self, **given)

    def check(self) -> ModelSource:
        """Check all that can be checked before weights are read, and say where the model is.

        Raises:
            InputError: what was expected, what came and what to do.
        """
        from fpe_kernels import backends

        if not self.source.strip():
            raise InputError("the source prompt is empty; describe the image to start from")
        if not self.targets or not all(target.strip() for target in self.targets):
            raise InputError("expected one or more target prompts with words in them; pass --target")
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, received {self.steps}")
        if not abs(self.guidance) < float("inf"):
            raise InputError(f"guidance must be a finite number, received {self.guidance}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be from 0 to 2^63 - 1, received {self.seed}")
        self.edit()
        states = {"auto": "available", **backends()}
        if states.get(self.backend) != "available":
            reason = states.get(self.backend, f"there are {', '.join(states)}")
            raise InputError(f"attention backend '{self.backend}' cannot be used here: {reason}; leave --backend out")
        pick_dtype(self.dtype, pick_device(self.device))
        source = find_model(self.model)
        source.check_size(self.size)
        return source


@dataclass(frozen=True)
class Run:
    """What `execute` made: the images by role and prompt order, and the record that `run.json` will hold."""

    settings: Settings
    source: Image.Image
    edited: tuple[Image.Image, ...]
    uncontrolled: tuple[Image.Image, ...] | None
    details: dict[str, Any] = field(repr=False)

    def comparisons(self) -> list[Comparison]:
        """One row a target, for `pictures.side_by_side`."""
        plain = self.uncontrolled or (None,) * len(self.edited)
        return [
            Comparison(self.settings.source, prompt, self.source, edited, without)
            for prompt, edited, without in zip(self.settings.targets, self.edited, plain, strict=True)
        ]

    def files(self) -> dict[str, tuple[Image.Image, str, str]]:
        """File name to (image, role, prompt), in the order in which they are reported."""
        named = {"source.png": (self.source, "source", self.settings.source)}
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
            "settings": dataclasses.asdict(self.settings),
            **self.details,
            "images": {
                name: {"role": role, "prompt": prompt, "pixels_sha256": pixel_hash(image)}
                for name, (image, role, prompt) in self.files().items()
            },
        }


def execute(settings: Settings, *, progress: bool = True, expected_model: str | None = None) -> Run:
    """Make the images of a run: the source and its edits, and each target without control.

    Args:
        settings: checked here before weights are read.
        progress: show diffusers' progress bars on standard error.
        expected_model: identity that the loaded model must have, as an earlier record gives it.

    Returns:
        A `Run`. Its settings have device, dtype, size and threads filled in, so that they repeat this very run.

    Raises:
        InputError: the settings cannot be served, or the model is not the expected one.
    """
    import torch

    from fpe_kernels import backends

    pipeline_class()  # so that its imports do not count as loading the model

    location = settings.check()
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    clock = _Clock()
    with _repeatable(settings.threads):
        with clock.measure("load"):
            pipe = load_pipeline(location, dtype=dtype, device=device)
        model = identity(pipe)
        if expected_model is not None and model != expected_model:
            raise InputError(
                f"model '{settings.model}' is not the one of the record: its weights, scheduler or dtype differ "
                f"({model[:12]}… instead of {expected_model[:12]}…); pass --model to use it all the same"
            )
        width, height = settings.size or (None, None)
        common: dict[str, Any] = {
            "height": height,
            "width": width,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
            "negative_prompt": settings.negative,
        }

        def generate(title: str, prompts: list[str], **options: Any) -> list[Image.Image]:
            pipe.set_progress_bar_config(desc=title, disable=not progress, leave=True)
            noise = torch.Generator().manual_seed(settings.seed)
            with clock.measure(title):
                try:
                    images, _ = pipe(prompts, generator=noise, return_dict=False, **common, **options)
                    return images
                except (TypeError, ValueError) as error:
                    raise InputError(str(error)) from error

        source, *edited = generate(
            "edit", [settings.source, *settings.targets], edit=settings.edit(), backend=settings.backend
        )
        plain = generate("no control", list(settings.targets), self_replace_steps=0) if settings.control else None
        settings = dataclasses.replace(
            settings,
            model=location.location if location.kind != "hub" and settings.model != EMBEDDED else settings.model,
            size=source.size,
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            threads=torch.get_num_threads(),
        )
        details = {
            "model": {"identity_sha256": model, "class": type(pipe).__name__, "scheduler": scheduler_settings(pipe)},
            "versions": versions(),
            "machine": _machine(device),
            "backends": backends(),
            "seconds": clock.seconds,
        }
    return Run(settings, source, tuple(edited), tuple(plain) if plain else None, details)


def write(run: Run, directory: Path) -> list[Path]:
    """Write images, `comparison.png` and `run.json` into `directory`; files of the same names are replaced.

    Everything is written beside its destination first and then renamed, `run.json` last: an error leaves no partial
    file.

    Returns:
        The paths, `comparison.png` first and `run.json` last.
    """
    images = {"comparison.png": side_by_side(run.comparisons(), edit_label=EDIT_LABEL)}
    images |= {name: image for name, (image, _, _) in run.files().items()}
    record = json.dumps(run.record(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with staged(directory) as stage:
        for name, image in images.items():
            image.save(stage / name, format="PNG")
        (stage / "run.json").write_text(record, encoding="utf-8")
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
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in dict(record.get("settings", {})).items()
    }
    hints = get_type_hints(Settings)
    unknown = values.keys() - hints.keys()
    mistyped = [name for name, value in values.items() if name in hints and not _has_type(value, hints[name])]
    missing = {"source", "targets"} - values.keys()
    if unknown or mistyped or missing:
        problems = [
            f"{what} {', '.join(sorted(names))}"
            for what, names in (("unknown", unknown), ("mistyped", mistyped), ("missing", missing))
            if names
        ]
        raise InputError(
            f"'{path}' does not hold settings of this version: {'; '.join(problems)}; make it with fpe edit"
        )
    return Settings(**values), record


def differences(run: Run, record: dict[str, Any]) -> str:
    """Which images of a repeated run differ from those of its record, and what may be why; empty where none does."""
    made, before = run.record(), record.get("images", {})
    changed = [
        name
        for name, image in made["images"].items()
        if image["pixels_sha256"] != before.get(name, {}).get("pixels_sha256")
    ]
    if not changed:
        return ""
    reasons = [
        f"{name} was {then} and is {now}"
        for part in ("versions", "machine")
        for name, now in made[part].items()
        if (then := record.get(part, {}).get(name)) != now
    ]
    why = "; ".join(reasons) or "the record names the same versions and machine"
    return f"these images differ from the record's: {', '.join(changed)} ({why})"


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 (hex) of size and RGB pixels: independent of how the file was compressed."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}\n".encode() + rgb.tobytes()).hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of what decides the images; None for what is not installed."""
    from fpe_kernels import __version__

    found: dict[str, str | None] = {"fpe": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "triton", "numpy", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value, lists turned into tuples, is of a type such as `tuple[int, int] | None`."""
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if kinds[-1] is ...:
            return all(_has_type(each, kinds[0]) for each in value)
        return len(value) == len(kinds) and all(map(_has_type, value, kinds))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and isinstance(value, bool) == (hint is bool)


def _machine(device: str) -> dict[str, Any]:
    import torch

    accelerator = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {"platform": platform.platform(), "accelerator": accelerator, "cuda": torch.version.cuda}


@contextlib.contextmanager
def _repeatable(threads: int | None) -> Iterator[None]:
    """Pin what would let two runs of the same settings round differently; put everything back afterwards."""
    import torch

    cudnn = torch.backends.cudnn
    before = torch.get_num_threads(), cudnn.deterministic, cudnn.benchmark
    if threads is not None:
        torch.set_num_threads(threads)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]


class _Clock:
    """Seconds of named stages, rounded to milliseconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
