"""What every method is tried on: pairs of held-out prompts, as generated pictures or as renders taken for photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...embedded.scenes.scenes import render, sample_scene
from ..study.pairs import EditPair

__all__ = ["GENERATED", "HELD_OUT", "Subject", "generated_subjects", "render_subjects"]

#: What ``--images`` takes beside a folder.
GENERATED, HELD_OUT = "generated", "held-out"


@dataclass(frozen=True, eq=False)
class Subject:
    """A picture and what it is to become.

    Args:
        name: identifies it among the scores.
        kind: the attribute that changes, or how a folder's edits are called together.
        source_prompt, target_prompt: what it shows and what it is to show.
        new_words: words of the target prompt that make the edit.
        region_words: a word of each prompt, (source, target), for the region that the edit is about: local blends
            change nothing outside it.
        object_word: the word of the source prompt whose outline is to be kept.
        picture: the real image, a path or uint8 [h, w, 3]; ``None`` where the source is generated.
        picture_name: what the real image is called, where several edits may be of one; empty where each has its own.
        mask: where the real image has its object, a path or uint8 [h, w] of the picture's size.
        scene: (object, colour, background) of the target, where a judge can tell whether it is shown.
        seed: of the noise that a generated source starts from.
        other_seed: of the noise that a target starts from where it is drawn without the source.
    """

    name: str
    kind: str
    source_prompt: str
    target_prompt: str
    new_words: tuple[str, ...]
    region_words: tuple[str, str] | None
    object_word: str | None
    picture: Path | np.ndarray | None = None
    picture_name: str = ""
    mask: Path | np.ndarray | None = None
    scene: tuple[str, str, str] | None = None
    seed: int = 0
    other_seed: int = 0


def generated_subjects(pairs: Sequence[EditPair]) -> list[Subject]:
    """The pairs of :func:`~.pairs.held_out_pairs`, each source to be generated from the pair's own noise.

    A pair's name is its kind and its number among that kind: it does not depend on how many pairs or kinds there are.
    """
    counted: dict[str, int] = {}
    subjects = []
    for pair in pairs:
        number = counted.get(pair.kind, 0)
        counted[pair.kind] = number + 1
        place = 2 if pair.kind == "background" else 0
        changed = ("object", "colour", "background").index(pair.kind)
        subjects.append(
            Subject(
                name=f"{pair.kind}-{number}",
                kind=pair.kind,
                source_prompt=pair.source_prompt,
                target_prompt=pair.target_prompt,
                new_words=(pair.target[changed],),
                region_words=(pair.source[place], pair.target[place]),
                object_word=pair.source[0],
                scene=pair.target,
                seed=pair.seed,
                other_seed=pair.other_seed,
            )
        )
    return subjects


def render_subjects(pairs: Sequence[EditPair], size: int) -> list[Subject]:
    """The same pairs with renders as sources: real images of which silhouette and attributes are known.

    Args:
        pairs: as for :func:`generated_subjects`.
        size: pixels a side, the model's own.
    """
    subjects = []
    for pair, subject in zip(pairs, generated_subjects(pairs), strict=True):
        drawn = render(sample_scene(np.random.default_rng(pair.seed), triple=pair.source), size)
        subjects.append(replace(subject, picture=drawn.image, mask=drawn.mask))
    return subjects
