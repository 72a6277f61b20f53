"""`fpe batch`: from options to what is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..batches.request import BatchRequest, Weights
from ..runs.progress import progress_for
from ..runs.settings import INVERSIONS, Settings
from .console import report, say
from .edit import BACKEND, DEVICE, DTYPE, JSON, QUIET, TRACEBACK
from .options import as_integers, as_layers, as_name_and_value, as_size, as_window, chosen, field

__all__ = ["EXAMPLES", "batch"]

EXAMPLES = r"""Examples:

fpe batch jobs.jsonl -o out/batch

fpe batch Car_real_edit.json --images cars --inversion direct

fpe batch PIE-Bench/mapping_file.json --inversion direct \
    --clip ./clip-vit-large-patch14 --dino ./dino-vitb8

fpe batch jobs.csv --workers 4 -o out/batch
    # and again after an interruption: only what is missing"""

_of, _job = functools.partial(field, BatchRequest), functools.partial(field, Settings)
_weights = functools.partial(field, Weights)
_LIST, _JOBS, _WORK, _MEASURES = "List", "Jobs that do not say otherwise", "Work", "Measures"


def batch(
    jobs: Annotated[Path, typer.Argument(help=BatchRequest.about("jobs"), metavar="LIST", show_default=False)],
    images: Annotated[Path | None, _of("images", panel=_LIST, note="default: the list's own", metavar="DIR")] = None,
    output: Annotated[
        Path | None, _of("output", "-o", "--output", panel=_LIST, note="default: out/batch", metavar="DIR")
    ] = None,
    negative: Annotated[str | None, _job("negative", panel=_JOBS, note="default: nothing", metavar="TEXT")] = None,
    inversion: Annotated[
        str | None, _job("inversion", panel=_JOBS, metavar="NAME", autocompletion=lambda: INVERSIONS)
    ] = None,
    inversion_guidance: Annotated[float | None, _job("inversion_guidance", panel=_JOBS, metavar="SCALE")] = None,
    inner_steps: Annotated[int | None, _job("inner_steps", panel=_JOBS, metavar="N")] = None,
    early_stop: Annotated[float | None, _job("early_stop", panel=_JOBS, metavar="ERROR")] = None,
    method: Annotated[str | None, _job("method", panel=_JOBS, note="as for fpe edit; default: fpe", metavar="NAME")] = (
        None
    ),
    option: Annotated[
        list[Any] | None,
        _job(
            "options", "--option", panel=_JOBS, note="repeat for more", metavar="NAME=VALUE", parser=as_name_and_value
        ),
    ] = None,
    self_replace: Annotated[
        Any, _job("self_replace", panel=_JOBS, note="as for fpe edit; default: 0.8", metavar="END", parser=as_window)
    ] = None,
    levels: Annotated[
        Any, _job("levels", panel=_JOBS, note="as for fpe edit", metavar="N,N", parser=as_integers)
    ] = None,
    max_tokens: Annotated[int | None, _job("max_tokens", panel=_JOBS, metavar="N")] = None,
    layers: Annotated[Any, _job("layers", panel=_JOBS, metavar="PATH,PATH", parser=as_layers)] = None,
    seed: Annotated[int | None, _job("seed", panel=_JOBS, metavar="N")] = None,
    steps: Annotated[int | None, _job("steps", panel=_JOBS, metavar="N")] = None,
    guidance: Annotated[float | None, _job("guidance", panel=_JOBS, metavar="SCALE")] = None,
    size: Annotated[Any, _job("size", panel=_JOBS, note="default: the model's", metavar="WxH", parser=as_size)] = None,
    at_once: Annotated[int | None, _of("at_once", panel=_WORK, metavar="N")] = None,
    workers: Annotated[int | None, _of("workers", panel=_WORK, metavar="N")] = None,
    cluster: Annotated[str | None, _of("cluster", panel=_WORK, metavar="ADDRESS")] = None,
    model: Annotated[str | None, _job("model", panel=_WORK, note="default: the embedded model", metavar="PATH")] = None,
    threads: Annotated[int | None, _job("threads", panel=_WORK, metavar="N")] = None,
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
