"""``fpe evaluate``: arguments, a run that can be continued, and what it writes."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

from ..atomic_folder import check_writable, staged
from ..errors import InputError
from ..models.loading import pick_device
from ..runs.settings import INVERSIONS, Settings
from ..texts import print_text
from .evaluated import EvaluatedModel
from .images_command import run_on_images
from .intervals import summarise
from .methods.contenders import CONTENDERS
from .methods.image_folder import PROMPT_FILES
from .store import ScoreFile, dump, environment, fingerprint, packed
from .study.conditions import Condition, method_conditions, standard_conditions, sweep_conditions
from .study.pairs import KINDS, EditPair, held_out_pairs
from .study.report import plot, table
from .study.scores import Score, evaluate

__all__ = ["add_arguments", "run"]

DEFAULT = Settings(source="", targets=())  # what `fpe edit` does where nothing is said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on a parser."""
    parser.add_argument("--pairs", type=int, default=200, help="edits of each kind (default: 200)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="attributes to change")
    parser.add_argument("--sweep", action="store_true", help="also vary the step window and the layers' level")
    parser.add_argument(
        "--methods",
        "--method",
        nargs="*",
        metavar="NAME",
        help="also Prompt-to-Prompt, Plug-and-Play and others; with --images, compare these alone (default: all of "
        f"{', '.join(CONTENDERS)}); of your own, name an edit's class as package.module:Class",
    )
    parser.add_argument(
        "--images",
        metavar="generated | held-out | FOLDER",
        help="compare every method, edit by edit and timed, on pictures: generated ones, renders of held-out scenes "
        f"taken for photos, or your own in a folder with {' or '.join(PROMPT_FILES)}",
    )
    parser.add_argument(
        "--inversion",
        dest="inversions",
        nargs="+",
        choices=INVERSIONS,
        help="how real images are inverted, one or several (default: ddim, with its latents as reference)",
    )
    parser.add_argument("--steps", type=int, default=DEFAULT.steps, help=f"denoising steps (default: {DEFAULT.steps})")
    parser.add_argument(
        "--guidance", type=float, default=DEFAULT.guidance, help=f"guidance scale (default: {DEFAULT.guidance:g})"
    )
    parser.add_argument(
        "--self-replace", type=float, default=DEFAULT.self_replace[1], help="part of the steps with replaced maps"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts, noise and bootstrap")
    parser.add_argument("--chunk", type=int, default=8, help="pairs drawn at a time")
    parser.add_argument("--model", type=Path, help="model folder with its judge (default: the embedded one)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/evaluation"), help="folder for the results")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table and write ``scores.jsonl``, ``evaluation.json``, ``table.md`` and ``plot.png``.

    The plot needs matplotlib, and is left out with a word where that is not installed.

    A run into a folder that holds the scores of an interrupted run with the same settings continues it.

    Returns:
        Exit status: 0.

    Raises:
        InputError: options that do not belong together or are out of range, no model or no judge, or a folder with
            scores made with other settings; before anything is computed or written.
    """
    _check_numbers(args)
    args.device = pick_device(args.device)
    if args.images is not None:
        return run_on_images(args)
    if args.methods or args.inversions:
        raise InputError("method names and --inversion choose what --images compares: pass it as well")
    model = EvaluatedModel.find(args.model, judged=True)
    check_writable(args.output)
    conditions = standard_conditions(args.self_replace)
    if args.sweep:
        conditions += sweep_conditions(self_replace_steps=args.self_replace)
    if args.methods is not None:
        conditions += method_conditions()
    pairs = held_out_pairs(args.pairs, args.kinds, args.seed)
    settings = {**_settings(args, conditions), "weights": fingerprint(model.folder)}
    # How many pairs are wanted may grow from run to run: the first ones stay the same.
    store = ScoreFile(args.output / "scores.jsonl", {**settings, "pairs": None})
    done = len(store.rows) // len(conditions)
    # What an interruption left of a pair would shift all that is appended.
    store.keep(done * len(conditions))
    if done < len(pairs):
        _draw_rest(model, args, pairs[done:], done, conditions, store)
    summary = summarise(store.rows, seed=args.seed)
    result = {"settings": settings, "environment": environment(), "summary": summary, "scores": packed(store.rows)}
    rendered = table(summary)
    with staged(args.output) as stage:
        (stage / "evaluation.json").write_text(dump(result), encoding="utf-8")
        (stage / "table.md").write_text(rendered, encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is None:
            print("fpe: no plot.png, which needs matplotlib: pip install matplotlib", file=sys.stderr)
        else:
            plot(summary, stage / "plot.png", f"{args.steps} steps, guidance {args.guidance:g}, 95 % intervals")
    print_text(rendered.removesuffix("\n"))
    return 0


def _draw_rest(
    model: EvaluatedModel,
    args: argparse.Namespace,
    pairs: list[EditPair],
    done: int,
    conditions: list[Condition],
    store: ScoreFile,
) -> None:
    pipe, judge = _load(model, args.device)

    def keep(fresh: list[Score]) -> None:
        store.add(*(score.to_json() for score in fresh))
        scored = len(store.rows) // len(conditions)
        print(f"scored {scored} of {done + len(pairs)} pairs", file=sys.stderr, flush=True)

    evaluate(
        pipe,
        judge,
        pairs,
        conditions,
        steps=args.steps,
        guidance=args.guidance,
        chunk=args.chunk,
        first=done,
        on_chunk=keep,
    )


def _load(model: EvaluatedModel, device: str) -> tuple[Any, Any]:
    from diffusers import StableDiffusionPipeline

    return model.load(device, StableDiffusionPipeline)


def _check_numbers(args: argparse.Namespace) -> None:
    for name, least in (("pairs", 1), ("steps", 1), ("chunk", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if not math.isfinite(args.guidance):
        raise InputError(f"--guidance must be a finite number, got {args.guidance}")
    if not 0 <= args.self_replace <= 1:
        raise InputError(f"--self-replace must be from 0 to 1, a part of the steps, got {args.self_replace}")


def _settings(args: argparse.Namespace, conditions: list[Condition]) -> dict[str, Any]:
    edits = {
        c.name: {"edit": repr(c.edit or (c.method, c.options)) if c.edit or c.method else None, "noise": c.shared_noise}
        for c in conditions
    }
    names = ("pairs", "kinds", "steps", "guidance", "self_replace", "seed")
    return {**{name: getattr(args, name) for name in names}, "conditions": edits}
