"""`fpe edit`: from options to settings, and what is done with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from ..errors import InputError
from ..runs.progress import progress_for
from ..runs.settings import OF_NULL_TEXT, Settings
from .console import report, say
from .options import chosen, flag
from .setting_options import BACKEND, DEVICE, DTYPE, IN_WORDS, JSON, QUIET, TRACEBACK, setting

__all__ = ["EXAMPLES", "check_optimisation", "edit", "with_its_model"]

EXAMPLES = r"""Examples:

fpe edit --source "a photo of a red car on the beach" \
    --target "a photo of a blue car on the beach"

fpe edit --source "a photo of a cat" --target "a photo of a dog" \
    --target "a photo of a fox" --model ./stable-diffusion-v1-5 \
    --size 512x512 --guidance 7.5 --seed 3 -o out/pets

fpe edit --image beach.jpg --source "a photo of a red car" \
    --target "a photo of a blue car" --inversion direct

fpe edit --recording out/inverted --target "a photo of a green car"
    # of fpe invert: only the target is denoised

fpe edit --from out/pets/run.json -o out/again
    # the same images; how far they are, if not to the bit

fpe edit --from out/pets/run.json --self-replace 0.4 -o out/looser

fpe edit --source "a red car" --target "a blue car" --images 3 \
    --sweep self-replace=0.2:1.0:5    # a sheet of fifteen edits"""

_PROMPTS, _PICTURES, _EDIT, _SAMPLING = "Prompts", "Real images", "Edit", "Sampling"


def edit(
    source: Annotated[str | None, setting("source", panel=_PROMPTS)] = None,
    target: Annotated[list[str] | None, setting("targets", panel=_PROMPTS)] = None,
    negative: Annotated[str | None, setting("negative", panel=_PROMPTS)] = None,
    record: Annotated[
        Path | None,
        flag(
            "--from",
            panel=_PROMPTS,
            text="repeat an earlier run, by run.json or a picture of it; options given beside it replace its settings",
            metavar="FILE",
        ),
    ] = None,
    image: Annotated[str | None, setting("image", panel=_PICTURES, note="--source may then be left out")] = None,
    recording: Annotated[
        Path | None,
        flag(
            "--recording",
            panel=_PICTURES,
            text="folder of fpe invert: its picture is edited without being denoised again",
            metavar="DIR",
        ),
    ] = None,
    inversion: Annotated[str | None, setting("inversion", panel=_PICTURES)] = None,
    inversion_guidance: Annotated[float | None, setting("inversion_guidance", panel=_PICTURES)] = None,
    inner_steps: Annotated[int | None, setting("inner_steps", panel=_PICTURES)] = None,
    early_stop: Annotated[float | None, setting("early_stop", panel=_PICTURES)] = None,
    method: Annotated[
        str | None,
        setting(
            "method",
            panel=_EDIT,
            note="`fpe info` lists the names, and classes are found in this directory or PYTHONPATH; default: fpe",
        ),
    ] = None,
    option: Annotated[
        list[Any] | None,
        setting(
            "options", panel=_EDIT, note="`fpe info --method NAME` shows them; such as start_step=4; repeat for more"
        ),
    ] = None,
    self_replace: Annotated[
        Any,
        setting(
            "self_replace",
            panel=_EDIT,
            note="END or START,END: 0.8 is the first 80 %; lower values follow the target prompt more; "
            f"{IN_WORDS['self_replace']}",
        ),
    ] = None,
    levels: Annotated[
        Any,
        setting(
            "levels",
            panel=_EDIT,
            note="default: 1 and deeper; with models of at most 32 x 32 tokens, as the embedded one, all",
        ),
    ] = None,
    max_tokens: Annotated[int | None, setting("max_tokens", panel=_EDIT)] = None,
    layers: Annotated[Any, setting("layers", panel=_EDIT)] = None,
    no_control: Annotated[
        bool, flag("--no-control", panel=_EDIT, text="do not make the targets without the edit")
    ] = False,
    model: Annotated[str | None, setting("model", panel=_SAMPLING)] = None,
    seed: Annotated[int | None, setting("seed", panel=_SAMPLING)] = None,
    steps: Annotated[int | None, setting("steps", panel=_SAMPLING)] = None,
    guidance: Annotated[float | None, setting("guidance", panel=_SAMPLING)] = None,
    size: Annotated[Any, setting("size", panel=_SAMPLING)] = None,
    images: Annotated[
        int | None,
        flag("--images", panel=_SAMPLING, text="so many pictures of each prompt, seed by seed", metavar="N"),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        flag(
            "--sweep",
            panel=_SAMPLING,
            text="a run for each value of a setting or an option, and a sheet of them: NAME=START:STOP:COUNT or "
            "NAME=VALUE,VALUE; twice for columns and rows",
            metavar="NAME=VALUES",
        ),
    ] = None,
    output: Annotated[
        Path, flag("-o", "--output", panel=_SAMPLING, text="folder for the results (default: out)", metavar="DIR")
    ] = Path("out"),
    device: Annotated[str | None, DEVICE] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    backend: Annotated[str | None, BACKEND] = None,
    as_json: Annotated[bool, JSON] = False,
    quiet: Annotated[bool, QUIET] = False,
    traceback: Annotated[bool, TRACEBACK] = False,
) -> Callable[[], int]:
    """Make an image of a prompt and edit it into others.

    An image of the source prompt is edited into one or more targets by changing the text only. All images start from
    the same noise; while they are denoised, the targets take the self-attention maps of the source, which keeps its
    layout. With --image, the source is your picture instead: it is inverted to noise first.

    The folder receives comparison.png (source, target without control, target with the edit), the images one by one,
    and run.json, which holds every setting, version and timing of the run. A picture keeps its aspect ratio at the
    model's own number of pixels, or is scaled to cover --size and cut in the middle; photo.png is what the model was
    given, source.png what came back.
    """
    given = chosen(
        source=source, targets=target, negative=negative, image=image, inversion=inversion,
        inversion_guidance=inversion_guidance, inner_steps=inner_steps, early_stop=early_stop, method=method,
        options=None if option is None else dict(option), self_replace=self_replace, levels=levels,
        max_tokens=max_tokens, layers=layers, control=False if no_control else None, model=model, seed=seed,
        steps=steps, guidance=guidance, size=size, device=device, dtype=dtype, backend=backend,
    )  # fmt: skip
    if images is not None and images < 1:
        raise InputError(f"--images takes a whole number from 1 on, got {images}")
    if recording is not None:
        _check_beside_recording(given, record, sweep, images)
        return functools.partial(_from_recording, recording, given, output, quiet, as_json)
    return functools.partial(_run, given, record, output, quiet, as_json, sweep or [], images)


def _run(
    given: dict[str, Any],
    path: Path | None,
    output: Path,
    quiet: bool,
    as_json: bool,
    axes: list[str],
    images: int | None,
) -> int:
    from ..atomic_folder import check_writable
    from ..runs import agreement
    from ..runs import run as runs

    settings, record = _settings(given, path)
    settings.check()
    check_writable(output)
    if record is not None and "model" not in given:
        settings = with_its_model(settings, record)
    if axes or images is not None:
        return _swept(settings, axes, images, output, quiet, as_json)
    same_model = record is not None and not {"model", "dtype", "device"} & given.keys()
    with progress_for(quiet=quiet) as progress:
        run = runs.execute(
            settings,
            progress=progress,
            expected_model=record["model"]["identity_sha256"] if record is not None and same_model else None,
            expected_photo=runs.photo_of(record) if record and not {"image", "size"} & given.keys() else None,
        )
    # Measured before the images are written: they may replace those that they are compared with.
    distance = None
    if path is not None and record is not None and not given:
        distance = agreement.differences(run, record, path)
    report(runs.write(run, output), as_json, record=run.record())
    if distance is not None:
        say(distance or "the images are those of the record, bit for bit")
    return 0


def _swept(settings: Settings, said: list[str], images: int | None, output: Path, quiet: bool, as_json: bool) -> int:
    from ..runs.sweep import Axis, check_number, check_sweep, parsed_axis, sweep

    axes = [parsed_axis(text) for text in said]
    if images is not None:
        check_number(images)
        axes.append(Axis("seed", tuple(range(settings.seed, settings.seed + images))))
    check_sweep(settings, axes)
    with progress_for(quiet=quiet) as progress:
        paths = sweep(settings, axes, output, progress)
    report(paths, as_json, axes={axis.name: axis.values for axis in axes})
    return 0


def _settings(given: dict[str, Any], path: Path | None) -> tuple[Settings, dict[str, Any] | None]:
    """The settings that the options and the record, where one is named, add up to; and the record."""
    from ..runs import run as runs
    from ..runs.edit_class import check_edit_class
    from ..runs.option_files import check_option_files

    if {"inversion", "inversion_guidance"} & given.keys() and "image" not in given and path is None:
        raise InputError("--inversion and --inversion-guidance are about a picture; pass it with --image")
    record = None
    if path is not None:
        settings, record = runs.read_record(path)
        settings = settings.changed(**given)
        if "method" not in given:
            check_edit_class(settings, record)
        if "options" not in given:
            check_option_files(settings, record)
    else:
        given = {"source": "", **given} if "image" in given else given
        missing = [f"--{name}" for name, key in (("source", "source"), ("target", "targets")) if key not in given]
        if missing:
            raise InputError(
                f"expected {' and '.join(missing)}, or --from with the run.json of an earlier run or a picture of it"
            )
        settings = Settings.of_model(**given)
    check_optimisation(settings, given)
    return settings, record


def check_optimisation(settings: Settings, given: dict[str, Any]) -> None:
    """Raise InputError for settings of null-text inversion beside another one."""
    if OF_NULL_TEXT & given.keys() and not settings.optimises:
        raise InputError("--inner-steps and --early-stop are null-text inversion's; pass --inversion null-text as well")


def _check_beside_recording(
    given: dict[str, Any], record: Path | None, sweep: list[str] | None, images: int | None
) -> None:
    """Raise InputError for options that a recording has decided, or that make several sources."""
    from ..runs.recording_folder import OF_THE_SOURCE

    flags = [name.replace("_", "-") for name in OF_THE_SOURCE if name in given]
    flags += [name for name, value in (("from", record), ("sweep", sweep), ("images", images)) if value is not None]
    if flags:
        raise InputError(
            f"a recording brings its source with it; leave {', '.join(f'--{name}' for name in flags)} out, or leave "
            "--recording out and pass --image"
        )


def _from_recording(folder: Path, given: dict[str, Any], output: Path, quiet: bool, as_json: bool) -> int:
    from ..atomic_folder import check_writable
    from ..runs.recording_folder import edit_from, read_recorded
    from ..runs.run import write

    settings, record = read_recorded(folder)
    settings = settings.changed(**given)
    settings.check()
    check_writable(output)
    if "model" not in given:
        settings = with_its_model(settings, record)
    with progress_for(quiet=quiet) as progress:
        run = edit_from(folder, settings, progress)
    report(write(run, output), as_json, record=run.record())
    return 0


def with_its_model(settings: Settings, record: dict[str, Any]) -> Settings:
    """`runs.with_its_model`, which says so where the record's weights are earlier ones."""
    from ..runs import run as runs

    found = runs.with_its_model(settings, record)
    if found.model != settings.model:
        say(f"the record was made with an earlier embedded model, {found.model}, which is used again")
    return found
