"""`fpe heatmap`: from options to where words act."""

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
from .edit import with_its_model
from .options import chosen, flag
from .setting_options import BACKEND, DEVICE, DTYPE, JSON, QUIET, TRACEBACK, setting

__all__ = ["EXAMPLES", "heatmap"]

EXAMPLES = """Examples:

fpe heatmap "a photo of a red car on the beach" --word car --word beach

fpe heatmap --from out/target-1.png --word car -o out/where

fpe heatmap "a photo of a red car" --image beach.jpg --word car"""

_WHAT, _PICTURES, _SAMPLING = "What is read", "Real images", "Sampling"


def heatmap(
    prompt: Annotated[
        str | None, typer.Argument(help="prompt of the picture; with --image, what that shows", show_default=False)
    ] = None,
    word: Annotated[
        list[str] | None,
        flag("--word", panel=_WHAT, text="a word or phrase of the prompt; repeat for more", metavar="TEXT"),
    ] = None,
    record: Annotated[
        Path | None,
        flag(
            "--from",
            panel=_WHAT,
            text="read the pictures of an earlier run, by run.json or one of them, in place of a prompt's",
            metavar="FILE",
        ),
    ] = None,
    image: Annotated[str | None, setting("image", panel=_PICTURES)] = None,
    inversion: Annotated[str | None, setting("inversion", panel=_PICTURES)] = None,
    negative: Annotated[str | None, setting("negative", panel=_SAMPLING)] = None,
    model: Annotated[str | None, setting("model", panel=_SAMPLING)] = None,
    seed: Annotated[int | None, setting("seed", panel=_SAMPLING)] = None,
    steps: Annotated[int | None, setting("steps", panel=_SAMPLING)] = None,
    guidance: Annotated[float | None, setting("guidance", panel=_SAMPLING)] = None,
    size: Annotated[Any, setting("size", panel=_SAMPLING)] = None,
    output: Annotated[
        Path, flag("-o", "--output", panel=_SAMPLING, text="folder for the results (default: out/heat)", metavar="DIR")
    ] = Path("out/heat"),
    device: Annotated[str | None, DEVICE] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    backend: Annotated[str | None, BACKEND] = None,
    as_json: Annotated[bool, JSON] = False,
    quiet: Annotated[bool, QUIET] = False,
    traceback: Annotated[bool, TRACEBACK] = False,
) -> Callable[[], int]:
    """Show where words act in a picture.

    A picture is made of the prompt, or the pictures of an earlier run once more, or yours is inverted and comes back;
    meanwhile the share of attention that each place pays each word is read from the layers' products. No map is stored.

    The folder receives heat.png, a sheet of pictures and words; of each word an overlay and its map as numbers (.npy,
    float32, rows and columns of the finest layer); and heat.json with every share and setting.
    """
    given = chosen(
        source=prompt, image=image, inversion=inversion, negative=negative, model=model, seed=seed, steps=steps,
        guidance=guidance, size=size, device=device, dtype=dtype, backend=backend,
    )  # fmt: skip
    words = tuple(dict.fromkeys(text.strip() for text in word or () if text.strip()))
    if not words:
        raise InputError("expected words of the prompt to look for, got none: pass --word, once for each")
    return functools.partial(_run, given, words, record, output, quiet, as_json)


def _run(
    given: dict[str, Any], words: tuple[str, ...], path: Path | None, output: Path, quiet: bool, as_json: bool
) -> int:
    from ..atomic_folder import check_writable
    from ..runs.heat import heat_of, write_heat

    settings = _settings(given, path)
    (settings.check if settings.targets else settings.check_source)()
    check_writable(output)
    with progress_for(quiet=quiet) as progress:
        heat = heat_of(settings, words, progress)
    rows = [each.as_json() for each in heat.words()]
    paths = write_heat(heat, output)
    if not (quiet or as_json):
        for row in rows:
            say(
                f"{row['picture']}, {row['word']!r}: {row['share']:.1%} of the attention, at most {row['most']:.1%}, "
                f"at {row['place'][0]}, {row['place'][1]}"
            )
    report(paths, as_json, heat=rows)
    return 0


def _settings(given: dict[str, Any], path: Path | None) -> Settings:
    from ..runs import run as runs

    if "inversion" in given and "image" not in given and path is None:
        raise InputError("--inversion is about a picture; pass it with --image")
    if path is not None:
        if own := given.keys() & {"source", "image"}:
            raise InputError(f"--from brings its own pictures; leave {' and '.join(sorted(own))} out")
        settings, record = runs.read_record(path)
        settings = settings.changed(**given)
        return settings if "model" in given else with_its_model(settings, record)
    if "source" not in given:
        raise InputError(
            "expected a prompt, whose words --word names, or --from with the run.json of an earlier run or a picture "
            "of it"
        )
    return Settings.of_model(targets=(), **given)
