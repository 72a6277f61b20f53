"""`fpe batch`: from options to what is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..batches.request import BatchRequest, Weights
from ..runs.progress import progress_for
from ..runs.settings import Settings
from .console import report, say
from .options import at_home, chosen, field
from .setting_options import BACKEND, DEVICE, DTYPE, IN_WORDS, JSON, QUIET, TRACEBACK, setting

__all__ = ["EXAMPLES", "batch"]

EXAMPLES = r"""Examples:

fpe batch jobs.jsonl -o out/batch

fpe batch Car_real_edit.json --images cars --inversion direct

fpe batch PIE-Bench/mapping_file.json --inversion direct \
    --clip ./clip-vit-large-patch14 --dino ./dino-vitb8

fpe batch jobs.csv --workers 4 -o out/batch
    # and again after an interruption: only what is missing"""

_of = functools.partial(field, BatchRequest)
_weights = functools.partial(field, Weights)
_LIST, _JOBS, _WORK, _MEASURES = "List", "Jobs that do not say otherwise", "Work", "Measures"


def batch(
    jobs: Annotated[
        Path, typer.Argument(help=BatchRequest.about("jobs"), metavar="LIST", show_default=False, callback=at_home)
    ],
    images: Annotated[Path | None, _of("images", panel=_LIST, note="default: the list's own", metavar="DIR")] = None,
    output: Annotated[
        Path | None, _of("output", "-o", "--output", panel=_LIST, note="default: out/batch", metavar="DIR")
    ] = None,
    negative: Annotated[str | None, setting("negative", panel=_JOBS)] = None,
    inversion: Annotated[str | None, setting("inversion", panel=_JOBS)] = None,
    inversion_guidance: Annotated[float | None, setting("inversion_guidance", panel=_JOBS)] = None,
    inner_steps: Annotated[int | None, setting("inner_steps", panel=_JOBS)] = None,
    early_stop: Annotated[float | None, setting("early_stop", panel=_JOBS)] = None,
    method: Annotated[str | None, setting("method", panel=_JOBS, note="as for fpe edit; default: fpe")] = None,
    option: Annotated[
        list[Any] | None,
        setting("options", panel=_JOBS, note="repeat for more"),
    ] = None,
    self_replace: Annotated[
        Any, setting("self_replace", panel=_JOBS, note=f"as for fpe edit; {IN_WORDS['self_replace']}")
    ] = None,
    levels: Annotated[Any, setting("levels", panel=_JOBS, note="as for fpe edit")] = None,
    max_tokens: Annotated[int | None, setting("max_tokens", panel=_JOBS)] = None,
    layers: Annotated[Any, setting("layers", panel=_JOBS)] = None,
    seed: Annotated[int | None, setting("seed", panel=_JOBS)] = None,
    steps: Annotated[int | None, setting("steps", panel=_JOBS)] = None,
    guidance: Annotated[float | None, setting("guidance", panel=_JOBS)] = None,
    size: Annotated[Any, setting("size", panel=_JOBS)] = None,
    at_once: Annotated[int | None, _of("at_once", panel=_WORK, metavar="N")] = None,
    workers: Annotated[int | None, _of("workers", panel=_WORK, metavar="N")] = None,
    cluster: Annotated[str | None, _of("cluster", panel=_WORK, metavar="ADDRESS")] = None,
    model: Annotated[str | None, setting("model", panel=_WORK)] = None,
    threads: Annotated[int | None, setting("threads", panel=_WORK)] = None,
    clip: Annotated[str | None, _weights("clip", panel=_MEASURES, metavar="DIR")] = None,
    dino: Annotated[str | None, _weights("dino", panel=_MEASURES, metavar="DIR")] = None,
    lpips: Annotated[str | None, _weights("lpips", panel=_MEASURES, metavar="FILE")] = None,
    device: Annotated[str | None, DEVICE] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    backend: Annotated[str | None, BACKEND] = None,
    as_json: Annotated[bool, JSON] = False,
    quiet: Annotated[bool, QUIET] = False,
    traceback: Annotated[bool, TRACEBACK] = False,
) -> Callable[[], int]:
    """Make many edits from one list.

    Each row names a source, a target and perhaps a picture, a mask and settings of its own; the lists of
    Free-Prompt-Editing's paper and PIE-Bench's mapping_file.json are read as they are. Jobs of one source share it: it
    is made, or its picture inverted, once.

    The folder receives each picture once, whole, with its settings in it, a manifest with checksums, and a summary of
    how far each edit is from its source. Whatever is there already is not made again. A job that fails is said and
    costs no other one anything; the exit code is then 1.
    """
    defaults = chosen(
        negative=negative, inversion=inversion, inversion_guidance=inversion_guidance, inner_steps=inner_steps,
        early_stop=early_stop, method=method, options=None if option is None else dict(option),
        self_replace=self_replace, levels=levels, max_tokens=max_tokens, layers=layers, seed=seed, steps=steps,
        guidance=guidance, size=size, model=model, threads=threads, device=device, dtype=dtype, backend=backend,
    )  # fmt: skip
    Settings("", (), **defaults)  # which says what is wrong with them once, not for every job
    weights = Weights(**chosen(clip=clip, dino=dino, lpips=lpips))
    given = chosen(output=output, images=images, at_once=at_once, workers=workers, cluster=cluster)
    return functools.partial(_run, BatchRequest(jobs=jobs, defaults=defaults, weights=weights, **given), quiet, as_json)


def _run(request: BatchRequest, quiet: bool, as_json: bool) -> int:
    from ..batches.batch import run

    with progress_for(quiet=quiet) as progress:
        finished = run(request, progress, say)
    report(finished.paths, as_json, **finished.as_json())
    return 1 if finished.failed else 0
