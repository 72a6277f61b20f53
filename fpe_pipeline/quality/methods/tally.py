"""The comparison's figures: means and intervals by origin, kind of edit and method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from ..intervals import mean_and_interval
from .contenders import CONTENDERS
from .subjects import GENERATED

__all__ = ["ALL", "compare"]

#: All kinds of edit together.
ALL = "all"
_OF_PICTURES = ("reconstruction", "autoencoder", "inversion_seconds")
_FIGURES = ("success", "iou", "outside_psnr", "seconds")


def compare(scores: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """Means and 95 % intervals: Wilson's for shares, bootstrapped for the rest.

    Args:
        scores: as :meth:`~.comparison.MethodScore.to_json` gives them.
        seed: of the bootstrap.

    Returns:
        ``{origin: {"pictures": n, "reconstruction": figure, "autoencoder": figure, "inversion_seconds": figure,
        "kinds": {kind: {method: {"edits": n, "asked": n, "reasons": […], "success": figure, "iou": …, "outside_psnr":
        …, "seconds": …}}}}}`` with a figure ``{"mean", "low", "high"}``, or ``None`` where nothing was measured; those
        of a picture have its ``"minimum"`` too. ``"edits"`` counts those that the method could make of ``"asked"``,
        ``"reasons"`` says why it could not make the others. The first kind is ``"all"``.
    """
    result: dict[str, Any] = {}
    for origin in dict.fromkeys(str(score["origin"]) for score in scores):
        mine = [score for score in scores if score["origin"] == origin]
        pictures = _of_pictures(mine)
        kinds = [ALL, *dict.fromkeys(str(score["kind"]) for score in mine)]
        result[origin] = {
            "pictures": len({_picture(score) for score in mine}),
            **{name: _figure(pictures, name, seed, minimum=True) for name in _OF_PICTURES},
            "kinds": {kind: _methods([s for s in mine if kind in (ALL, s["kind"])], seed) for kind in kinds},
        }
        if origin == GENERATED:
            for name in _OF_PICTURES:
                del result[origin][name]
    return result


def _picture(score: Mapping[str, Any]) -> str:
    """What a score is of: its picture, or its edit where no other one is of that."""
    return str(score.get("picture") or score["subject"])


def _of_pictures(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of each picture: every edit of one brings the same figures of it, and those do not count again.

    Inverted by several prompts, it has the mean of them.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for score in scores:
        for name in _OF_PICTURES:
            if score["reconstruction"] is not None and score[name] is not None:
                found.setdefault(_picture(score), {}).setdefault(name, {})[str(score["subject"])] = score[name]
    return [{name: fmean(of[name].values()) if name in of else None for name in _OF_PICTURES} for of in found.values()]


def _methods(scores: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    found = {}
    # Scores that were added later stand behind the others; the table keeps the contenders' order, then that of classes.
    for method in sorted(dict.fromkeys(str(score["method"]) for score in scores), key=_place):
        rows = [score for score in scores if score["method"] == method]
        made = [row for row in rows if not row["reason"]]
        found[method] = {
            "edits": len(made),
            "asked": len(rows),
            **{figure: _figure(made, figure, seed) for figure in _FIGURES},
            "reasons": sorted({row["reason"] for row in rows if row["reason"]}),
        }
    return found


def _place(method: str) -> int:
    return CONTENDERS.index(method) if method in CONTENDERS else len(CONTENDERS)


def _figure(
    rows: Sequence[Mapping[str, Any]], name: str, seed: int, *, minimum: bool = False
) -> dict[str, float] | None:
    values = [float(row[name]) for row in rows if row[name] is not None]
    if not values:
        return None
    figure = mean_and_interval(np.array(values), seed, share=name == "success")
    return {**figure, "minimum": round(min(values), 4)} if minimum else figure
