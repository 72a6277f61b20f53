"""``fpe evaluate --images``: every method on one set of pictures, a run that can be continued, what it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic_folder import check_writable, staged
from ..errors import InputError
from ..runs.model_defaults import check_guidance_of
from ..runs.progress import Progress
from ..texts import print_text
from .evaluated import EvaluatedModel
from .methods.comparison import LatestInversions, MethodScore, score_subject
from .methods.comparison_table import inversion_table, method_table
from .methods.contenders import Contender, chosen, contenders
from .methods.image_folder import folder_digest, folder_subjects
from .methods.subjects import GENERATED, HELD_OUT, Subject, generated_subjects, render_subjects
from .methods.tally import compare
from .request import Evaluation
from .store import ScoreFile, brief, configuration, dump, environment, fingerprint, packed
from .study.pairs import held_out_pairs

__all__ = ["check_given", "run_on_images"]

#: What says which edits are drawn; a folder's own are in its prompts file.
_OF_DRAWN = ("pairs", "kinds")


def check_given(asked: Evaluation) -> None:
    """Raise InputError where a request says something that would do nothing.

    Args:
        asked: as it was said: of values replaced since, nobody knows which were.
    """
    if asked.images is None:
        return
    if "chunk" in asked.model_fields_set:
        raise InputError("--chunk is of runs without --images, which draw several pairs at a time: leave it out")
    given = [f"--{name}" for name in _OF_DRAWN if name in asked.model_fields_set]
    if given and asked.images not in (GENERATED, HELD_OUT):
        raise InputError(
            f"{' and '.join(given)} choose among edits that are drawn, and the prompts file of '{asked.images}' says "
            "which are made of its pictures: leave it out, or pass --images held-out"
        )


def run_on_images(asked: Evaluation, progress: Progress, *, as_json: bool = False) -> int:
    """Compare the methods, print the table and write ``scores.jsonl``, ``evaluation.json`` and ``table.md``.

    Every score is kept as soon as it exists. A run into the folder of an earlier one with the same settings adds what
    is missing there: more pairs, other kinds of edit, methods or inversions.

    Returns:
        Exit status: 0.

    Raises:
        InputError: options that do not belong together, no model or no judge, a folder with something missing or
            damaged, or an output folder with scores made with other settings; before anything is computed or written.
    """
    own = asked.images not in (GENERATED, HELD_OUT)
    model = EvaluatedModel.find(asked.model, judged=not own)
    model.check_text_tokens(asked.text_tokens)
    check_guidance_of(str(asked.model), model.source, asked.guidance)
    methods = chosen(asked.methods or (), asked.self_replace, model.served)
    if asked.sweep:
        raise InputError("--sweep varies one method on generated images: leave it out, or leave out --images")
    if asked.images == GENERATED and asked.inversions:
        raise InputError("generated images are not inverted: leave --inversion out, or pass --images held-out")
    folder = Path(asked.images or "")
    subjects = folder_subjects(folder) if own else []
    check_writable(asked.output)
    origins = (GENERATED,) if asked.images == GENERATED else tuple(asked.inversions or (model.inversions[0],))
    _check_inversions(origins, model)
    unguided = sorted({"null-text", "negative-prompt"}.intersection(origins)) if asked.guidance <= 1 else []
    if unguided:
        raise InputError(
            f"{' and '.join(unguided)} inversion lives in the unconditional half of classifier-free guidance, which "
            f"--guidance {asked.guidance:g} switches off; pass a larger one, or --inversion direct"
        )
    settings = {
        "images": folder_digest(folder) if own else asked.images,
        **{name: getattr(asked, name) for name in ("steps", "guidance", "self_replace", "seed", "device")},
        "methods": {contender.name: contender.about for contender in contenders(asked.self_replace, model.served)},
        "weights": fingerprint(model.folder),
        "configuration": configuration(model.folder),
        **({} if asked.text_tokens is None else {"text_tokens": asked.text_tokens}),
    }
    # Scores of a version that measured other figures are not to be mixed with these.
    figures = [field.name for field in dataclasses.fields(MethodScore)]
    store = ScoreFile(asked.output / "scores.jsonl", {**settings, "figures": figures})
    pipe, judge = _load(model, asked.device)
    if not own:
        pairs = held_out_pairs(asked.pairs, asked.kinds, asked.seed)
        drawn = asked.images == GENERATED
        subjects = generated_subjects(pairs) if drawn else render_subjects(pairs, pipe.native_size[0])
    _score_rest(pipe, judge, subjects, origins, methods, store, asked, progress)
    summary = compare(store.rows, seed=asked.seed)
    result = {"settings": settings, "environment": environment(), "summary": summary, "scores": packed(store.rows)}
    rendered = method_table(summary)
    if asked.images != GENERATED:
        rendered += "\n" + inversion_table(summary)
    with staged(asked.output) as stage:
        (stage / "evaluation.json").write_text(dump(result), encoding="utf-8")
        (stage / "table.md").write_text(rendered, encoding="utf-8")
    print_text(brief(result) if as_json else rendered.removesuffix("\n"))
    return 0


def _score_rest(
    pipe: Any,
    judge: Any,
    subjects: Sequence[Subject],
    origins: Sequence[str],
    methods: Sequence[Contender],
    store: ScoreFile,
    asked: Evaluation,
    progress: Progress,
) -> None:
    """Score what the store does not hold, edit by edit, so that any beginning has all methods."""
    known = {(row["subject"], row["origin"], row["method"]) for row in store.rows}
    inversions = LatestInversions()
    for number, subject in enumerate(subjects, start=1):
        for origin in origins:
            missing = [m for m in methods if (subject.name, origin, m.name) not in known]
            if not missing:
                continue
            texts = {} if asked.text_tokens is None else {"max_sequence_length": asked.text_tokens}
            steps, guidance = asked.steps, asked.guidance
            for score in score_subject(
                pipe, judge, subject, origin, missing, steps=steps, guidance=guidance, inversions=inversions, **texts
            ):
                store.add(score.to_json())
        progress.tell("edits scored", number, len(subjects))


def _load(model: EvaluatedModel, device: str) -> tuple[Any, Any]:
    from ..sampling.noise_schedule import ddim_scheduler

    pipe, judge = model.load(device)
    if not model.is_transformer:
        pipe.scheduler = ddim_scheduler(pipe.scheduler)
    return pipe, judge


def _check_inversions(origins: Sequence[str], model: EvaluatedModel) -> None:
    unknown = [origin for origin in origins if origin != GENERATED and origin not in model.inversions]
    if unknown:
        raise InputError(
            f"inversion {' and '.join(unknown)} is not one of {'transformers' if model.is_transformer else 'UNets'}; "
            f"they have {', '.join(model.inversions)}"
        )
