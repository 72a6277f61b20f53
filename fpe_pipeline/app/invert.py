"""`fpe invert`: from options to a picture's recording, which `fpe edit --recording` edits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..runs.progress import progress_for
from ..runs.settings import Settings
from .console import report, say
from .edit import check_optimisation
from .options import at_home, chosen, flag
from .setting_options import BACKEND, DEVICE, DTYPE, JSON, QUIET, TRACEBACK, setting

__all__ = ["EXAMPLES", "invert"]

EXAMPLES = """Examples:

fpe invert beach.jpg --prompt "a photo of a red car" -o out/beach

fpe edit --recording out/beach --target "a photo of a blue car"

fpe invert beach.jpg --inversion null-text --method masactrl"""

_PICTURE, _KEPT, _SAMPLING = "Picture", "What is kept", "Sampling"


def invert(
    image: Annotated[
        str, typer.Argument(help="path of a picture", metavar="PICTURE", show_default=False, callback=at_home)
    ],
    prompt: Annotated[
        str | None,
        flag("--prompt", "--source", panel=_PICTURE, text="what the picture shows; may be left out", metavar="TEXT"),
    ] = None,
    negative: Annotated[str | None, setting("negative", panel=_PICTURE)] = None,
    inversion: Annotated[str | None, setting("inversion", panel=_PICTURE)] = None,
    inversion_guidance: Annotated[float | None, setting("inversion_guidance", panel=_PICTURE)] = None,
    inner_steps: Annotated[int | None, setting("inner_steps", panel=_PICTURE)] = None,
    early_stop: Annotated[float | None, setting("early_stop", panel=_PICTURE)] = None,
    method: Annotated[
        list[str] | None,
        flag(
            "--method",
            panel=_KEPT,
            text="a method whose edits the recording serves, by its defaults; repeat for more (default: fpe and "
            "p2p-replace, in all steps)",
            metavar="NAME",
        ),
    ] = None,
    precision: Annotated[
        str,
        flag(
            "--precision",
            panel=_KEPT,
            text="how the recording is kept: exact, half, or int8-keys, a quarter, of UNets (default: exact)",
            metavar="NAME",
        ),
    ] = "exact",
    output: Annotated[
        Path, flag("-o", "--output", panel=_KEPT, text="a new folder (default: out/inverted)", metavar="DIR")
    ] = Path("out/inverted"),
    model: Annotated[str | None, setting("model", panel=_SAMPLING)] = None,
    steps: Annotated[int | None, setting("steps", panel=_SAMPLING)] = None,
    guidance: Annotated[float | None, setting("guidance", panel=_SAMPLING)] = None,
    size: Annotated[Any, setting("size", panel=_SAMPLING)] = None,
    device: Annotated[str | None, DEVICE] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    backend: Annotated[str | None, BACKEND] = None,
    as_json: Annotated[bool, JSON] = False,
    quiet: Annotated[bool, QUIET] = False,
    traceback: Annotated[bool, TRACEBACK] = False,
) -> Callable[[], int]:
    """Invert a picture once, for any number of edits.

    The picture's way to noise is found and its way back recorded; `fpe edit --recording` then denoises the targets
    alone. How exactly the picture comes back is said in dB.

    The folder receives photo.png, what the model was given; source.png, what came back; the recording; and run.json
    with every setting, version and timing.
    """
    given = chosen(
        source=prompt or "", image=image, negative=negative, inversion=inversion, inversion_guidance=inversion_guidance,
        inner_steps=inner_steps, early_stop=early_stop, model=model, steps=steps, guidance=guidance, size=size,
        device=device, dtype=dtype, backend=backend,
    )  # fmt: skip
    return functools.partial(_run, given, tuple(method or ()), precision, output, quiet, as_json)


def _run(
    given: dict[str, Any], methods: tuple[str, ...], precision: str, output: Path, quiet: bool, as_json: bool
) -> int:
    from ..runs.recording_folder import check_new, record_into

    settings = Settings.of_model(targets=(), **given)
    check_optimisation(settings, given)
    source = settings.check_source()
    if not source.served.is_recorded:
        raise InputError(
            f"model '{settings.model}' is {source.served.words}, of which nothing is recorded; edit the picture "
            "itself: fpe edit --image …"
        )
    check_new(output, settings, methods, precision)
    with progress_for(quiet=quiet) as progress:
        kept = record_into(output, settings, progress, methods=methods, precision=precision)
    if not quiet:
        say(f"the picture comes back at {kept.psnr:.1f} dB; {kept.nbytes / 2**20:.1f} MiB are recorded")
    report(kept.paths, as_json, psnr=round(kept.psnr, 3), bytes=kept.nbytes, record=kept.record)
    return 0
