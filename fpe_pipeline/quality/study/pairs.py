"""The edits that are asked for: a source prompt of a held-out scene and a target that changes one attribute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...embedded.scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS, prompt, triples
from ..request import KINDS

__all__ = ["KINDS", "EditPair", "held_out_pairs"]

_PLACE = {"object": 0, "colour": 1, "background": 2}
_VALUES = {"object": OBJECTS, "colour": tuple(COLOURS), "background": BACKGROUNDS}


@dataclass(frozen=True)
class EditPair:
    """One edit.

    Args:
        kind: the attribute that changes, one of :data:`KINDS`.
        source, target: (object, colour, background) of the two prompts.
        seed: of the noise that both start from.
        other_seed: of the noise that a target starts from where it is drawn without the source's.
    """

    kind: str
    source: tuple[str, str, str]
    target: tuple[str, str, str]
    seed: int
    other_seed: int

    @property
    def source_prompt(self) -> str:
        return prompt(*self.source)

    @property
    def target_prompt(self) -> str:
        return prompt(*self.target)


def held_out_pairs(count: int, kinds: Sequence[str] = KINDS, seed: int = 0) -> list[EditPair]:
    """``count`` edits of each kind, their sources spread evenly over the triples held out of training.

    The first pairs are the same for every ``count``. Kinds alternate, so that any beginning of the list holds about as
    many of each.

    Raises:
        ValueError: an unknown kind, or ``count`` below 1.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"unknown kinds of edit {unknown}: expected some of {list(KINDS)}")
    if count < 1:
        raise ValueError(f"at least one pair of each kind is needed, got {count}")
    held = triples(held=True)
    pairs = []
    for index in range(count):
        for kind in kinds:
            rng = np.random.default_rng((seed, index, KINDS.index(kind)))
            # Each run through the held-out triples is in an order of its own.
            order = np.random.default_rng((seed, index // len(held), KINDS.index(kind), 1)).permutation(len(held))
            source = held[order[index % len(held)]]
            place = _PLACE[kind]
            target = list(source)
            target[place] = str(rng.choice([value for value in _VALUES[kind] if value != source[place]]))
            noise, other = (int(s) for s in rng.integers(2**31, size=2))
            pairs.append(EditPair(kind, source, (target[0], target[1], target[2]), noise, other))
    return pairs
