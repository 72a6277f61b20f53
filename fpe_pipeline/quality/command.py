"""``fpe evaluate``: a run that can be continued, and what it writes."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from ..atomic_folder import check_writable, staged
from ..errors import InputError
from ..models.loading import pick_device, pick_dtype
from ..runs.progress import Progress
from ..texts import print_text
from .evaluated import EvaluatedModel
from .images_command import check_given, run_on_images
from .intervals import summarise
from .request import Evaluation
from .store import ScoreFile, brief, configuration, dump, environment, fingerprint, packed
from .study.conditions import (
    Condition,
    method_conditions,
    standard_conditions,
    sweep_conditions,
    transformer_conditions,
)
from .study.pairs import EditPair, held_out_pairs
from .study.report import plot, table
from .study.scores import Score, evaluate

__all__ = ["run"]


def run(asked: Evaluation, progress: Progress | None = None, *, as_json: bool = False) -> int:
    """Evaluate, print the table and write ``scores.jsonl``, ``evaluation.json``, ``table.md`` and ``plot.png``.

    The plot needs matplotlib, and is left out with a word where that is not installed.

    ``as_json`` prints settings, environment and summary as JSON in the table's place.

    A run into a folder that holds the scores of an interrupted run with the same settings continues it.

    Returns:
        Exit status: 0.

    Raises:
        InputError: options that do not belong together, no model or no judge, or a folder with
            scores made with other settings; before anything is computed or written.
    """
    check_given(asked)
    asked, progress = asked.with_values(device=pick_device(asked.device)), progress or Progress()
    if asked.images is not None:
        return run_on_images(asked, progress, as_json=as_json)
    if asked.methods or asked.inversions:
        raise InputError("method names and --inversion choose what --images compares: pass it as well")
    model = EvaluatedModel.find(asked.model, judged=True)
    model.check_text_tokens(asked.text_tokens)
    check_writable(asked.output)
    conditions = _conditions(asked, model.is_transformer)
    pairs = held_out_pairs(asked.pairs, asked.kinds, asked.seed)
    of_model = {"weights": fingerprint(model.folder), "configuration": configuration(model.folder)}
    settings = {**_settings(asked, conditions), **of_model}
    # How many pairs are wanted may grow from run to run: the first ones stay the same.
    store = ScoreFile(asked.output / "scores.jsonl", {**settings, "pairs": None})
    done = len(store.rows) // len(conditions)
    # What an interruption left of a pair would shift all that is appended.
    store.keep(done * len(conditions))
    if done < len(pairs):
        _draw_rest(model, asked, pairs[done:], done, conditions, store, progress)
    # Of what was asked for: an earlier run may have left more, which the next one may ask for again.
    rows = store.rows[: len(pairs) * len(conditions)]
    summary = summarise(rows, seed=asked.seed)
    result = {"settings": settings, "environment": environment(), "summary": summary, "scores": packed(rows)}
    rendered = table(summary)
    with staged(asked.output) as stage:
        (stage / "evaluation.json").write_text(dump(result), encoding="utf-8")
        (stage / "table.md").write_text(rendered, encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is None:
            print_text("fpe: no plot.png, which needs matplotlib: pip install matplotlib", sys.stderr)
        else:
            plot(summary, stage / "plot.png", f"{asked.steps} steps, guidance {asked.guidance:g}, 95 % intervals")
    print_text(brief(result) if as_json else rendered.removesuffix("\n"))
    return 0


def _conditions(asked: Evaluation, transformer: bool) -> list[Condition]:
    """What is compared, by what the model can be edited with."""
    if transformer:
        if asked.sweep:
            raise InputError("--sweep varies the levels of a UNet, and this model has a transformer: leave it out")
        return transformer_conditions(asked.self_replace, methods=asked.methods is not None)
    conditions = standard_conditions(asked.self_replace)
    if asked.sweep:
        conditions += sweep_conditions(self_replace_steps=asked.self_replace)
    return conditions + method_conditions() if asked.methods is not None else conditions


def _draw_rest(
    model: EvaluatedModel,
    asked: Evaluation,
    pairs: list[EditPair],
    done: int,
    conditions: list[Condition],
    store: ScoreFile,
    progress: Progress,
) -> None:
    pipe, judge = _load(model, asked.device)

    def keep(fresh: list[Score]) -> None:
        store.add(*(score.to_json() for score in fresh))
        progress.tell("pairs scored", len(store.rows) // len(conditions), done + len(pairs))

    options: dict[str, Any] = {} if asked.text_tokens is None else {"max_sequence_length": asked.text_tokens}
    evaluate(
        pipe,
        judge,
        pairs,
        conditions,
        steps=asked.steps,
        guidance=asked.guidance,
        chunk=asked.chunk,
        first=done,
        **options,
        on_chunk=keep,
    )


def _load(model: EvaluatedModel, device: str) -> tuple[Any, Any]:
    """The pipeline of diffusers, which takes a list of prompts for as many pictures, and the judge."""
    from diffusers import StableDiffusionPipeline

    if not model.is_transformer:
        return model.load(device, StableDiffusionPipeline)
    pipe, judge = model.load(device)
    stock = pipe.parent(**pipe.components)
    stock.set_progress_bar_config(disable=True)
    return stock, judge


def _settings(asked: Evaluation, conditions: list[Condition]) -> dict[str, Any]:
    edits = {
        c.name: {"edit": repr(c.edit or (c.method, c.options)) if c.edit or c.method else None, "noise": c.shared_noise}
        for c in conditions
    }
    names = ("pairs", "kinds", "steps", "guidance", "self_replace", "seed")
    texts = {} if asked.text_tokens is None else {"text_tokens": asked.text_tokens}
    # Devices of one precision draw the same pictures, to rounding.
    dtype = str(pick_dtype("auto", asked.device)).removeprefix("torch.")
    precision = {} if dtype == "float32" else {"dtype": dtype}
    return {**{name: getattr(asked, name) for name in names}, **texts, **precision, "conditions": edits}
