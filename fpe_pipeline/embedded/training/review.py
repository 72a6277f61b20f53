"""What a fresh export is worth: how often it draws what it is asked for, what edits do, and pictures to look at."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ...images.side_by_side import Comparison, side_by_side
from ...quality.intervals import summarise
from ...quality.study.conditions import FREE_PROMPT, SHARED_NOISE, standard_conditions
from ...quality.study.pairs import KINDS, EditPair, held_out_pairs
from ...quality.study.scores import draw_pairs, evaluate
from ..judge import Judge, load_judge
from ..measure import draw, measure_generation
from ..scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS, prompt
from .presets import Preset
from .timebox import TimeBox

__all__ = ["contact_sheet", "review", "samples"]

log = logging.getLogger(__name__)

_SPARE = 3.0  # seconds at the end that no figure may take
# What `fpe demo` shows, and two more.
_SHOWN = (
    ("colour", ("car", "red", "beach"), ("car", "blue", "beach")),
    ("object", ("balloon", "purple", "meadow"), ("mushroom", "purple", "meadow")),
    ("background", ("house", "green", "snow"), ("house", "green", "desert")),
    ("colour", ("cat", "orange", "city"), ("cat", "black", "city")),
)


def review(
    folder: Path,
    report: Path | None,
    preset: Preset,
    figures: dict[str, Any],
    *,
    device: str,
    seed: int,
    box: TimeBox,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Measure a model folder, as far as the time goes; pictures first, since eyes see more than figures.

    Args:
        folder: the export.
        report: where pictures go; none are made without it.
        preset: says how many pictures and edits to measure on.
        figures: receives ``"generated"``.
        device, seed: as of the training.
        box: each further part is begun only where it will be over in time.
        keep: called after each part with the summary of the edits so far: see :func:`fpe_pipeline.quality.summarise`.
    """
    half = {"torch_dtype": torch.float16} if device.startswith("cuda") else {}
    pipe = StableDiffusionPipeline.from_pretrained(folder, **half).to(device)
    pipe.set_progress_bar_config(disable=True)
    batch, steps = 256 if device.startswith("cuda") else 32, preset.steps
    box.mark("load")

    def pictures() -> None:
        if report is not None:
            report.mkdir(parents=True, exist_ok=True)
            contact_sheet(pipe, seeds=(seed, seed + 1), steps=steps).save(report / "contact_sheet.png")
            samples(pipe, seed=seed, steps=steps, batch=batch).save(report / "samples.png")

    def generated() -> None:
        options: dict[str, Any] = {"steps": steps, "seed": seed, "device": device, "batch": batch, "pipe": pipe}
        figures["generated"] = measure_generation(folder, preset.generated, **options)
        log.info("generated: %s", figures["generated"])

    summary: dict[str, Any] = {}
    parts: dict[str, Callable[[], None]] = {"pictures": pictures, "generated": generated}
    if preset.edits:
        judge = load_judge(folder / "judge.safetensors").to(device)
        chunk = 64 if device.startswith("cuda") else 8
        for kind in KINDS:
            parts[f"{kind} edits"] = partial(_edits, pipe, judge, kind, preset, chunk, summary)
    took = 0.0
    for name, part in parts.items():
        # Edits of one kind take what those of another took.
        if box.left < _SPARE + (1.2 * took if name.endswith("edits") else 0.0):
            log.info("no time for: %s", name)
            continue
        begun = time.monotonic()
        try:
            part()
        except Exception:  # the export is whole, and what else can be told of it should be
            log.exception("left out: %s", name)
        took = time.monotonic() - begun
        box.mark(name)
        keep(summary)


def _edits(pipe: Any, judge: Judge, kind: str, preset: Preset, chunk: int, summary: dict[str, Any]) -> None:
    """Edits of held-out pairs of one kind, summed up into ``summary``."""
    # Torch's own attention: a kernel would have to be compiled for a few seconds of use.
    pairs, conditions = held_out_pairs(preset.edits, [kind]), standard_conditions()
    scores = evaluate(pipe, judge, pairs, conditions, steps=preset.steps, chunk=chunk, backend="torch")
    summary |= summarise([score.to_json() for score in scores])
    for condition, entry in summary[kind].items():
        means = {name: entry[name]["mean"] for name in ("success", "edit_object", "iou")}
        log.info("%s, %s: %s", kind, condition, means)


def contact_sheet(pipe: Any, *, seeds: tuple[int, ...], steps: int) -> Image.Image:
    """Source, target from the same noise, and target by Free-Prompt-Editing, of a few edits, a row each."""
    pairs = [EditPair(kind, source, target, seed, seed) for kind, source, target in _SHOWN for seed in seeds]
    drawn = draw_pairs(pipe, pairs, standard_conditions()[1:], steps=steps, backend="torch")
    columns = [[Image.fromarray(picture) for picture in drawn[name]] for name in ("", FREE_PROMPT, SHARED_NOISE)]
    rows = [
        Comparison(pair.source_prompt, pair.target_prompt, source, edited, uncontrolled)
        for pair, source, edited, uncontrolled in zip(pairs, *columns, strict=True)
    ]
    return side_by_side(rows, edit_label="target, Free-Prompt-Editing", tile=256)


def samples(pipe: Any, *, seed: int, steps: int, batch: int) -> Image.Image:
    """Every object before every background, in one colour after the other: objects down, backgrounds across."""
    colours = list(COLOURS)
    wanted = [
        prompt(name, colours[(i + j) % len(colours)], place)
        for i, name in enumerate(OBJECTS)
        for j, place in enumerate(BACKGROUNDS)
    ]
    images = draw(pipe, wanted, [seed + i for i in range(len(wanted))], steps=steps, guidance=5.0, batch=batch)
    tiles = np.stack([np.asarray(image) for image in images])
    rows = tiles.reshape(len(OBJECTS), len(BACKGROUNDS), *tiles.shape[1:])
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0))
