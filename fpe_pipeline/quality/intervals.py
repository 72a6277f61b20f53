"""Means of per-pair values with 95 % intervals: Wilson's for shares, a bootstrap that respects pairing for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from .study.conditions import SHARED_NOISE

__all__ = ["FIGURES", "INTERVALS", "bootstrap_interval", "mean_and_interval", "share_interval", "summarise"]

INTERVALS = "95 % intervals, Wilson's for shares and bootstrapped for means"

_TRUTHS = ("object", "colour", "background")
_SHARES = (*(f"source_{t}" for t in _TRUTHS), *(f"edit_{t}" for t in _TRUTHS), "success")
FIGURES = (*_SHARES, "iou", "outside_psnr")


def bootstrap_interval(
    values: np.ndarray, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values`` ``[n]``; a paired one, if they are differences.

    Raises:
        ValueError: there are no values or resamples, or the level is not between 0 and 1.
    """
    _check_level(level)
    if resamples < 1:
        raise ValueError(f"expected a resample at least, got {resamples}")
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected a non-empty vector of values, got shape {values.shape}")
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [values[rng.integers(len(values), size=(500, len(values)))].mean(axis=1) for _ in range(-(-resamples // 500))]
    )
    low, high = np.quantile(means[:resamples], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_interval(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share: unlike resampling, it knows that six of six is not certainty.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Raises:
        ValueError: there are no trials, or fewer than successes, or the level is not between 0 and 1.
    """
    _check_level(level)
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and a trial at least, got {successes} of {trials}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, shrink = successes / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5 / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(scores: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """Means and intervals by kind and condition, and what each condition gains over shared noise.

    Args:
        scores: the per-pair values, as :meth:`Score.to_json` gives them.
        seed: of the bootstrap.

    Returns:
        ``{kind: {condition: {figure: {"mean", "low", "high"}, "pairs": n, "gain_over_shared_noise": {…}}}}``. An edit
        is a *success* where all three attributes are the target's. ``gain_over_shared_noise`` is the mean of the
        paired differences in IoU.
    """
    kinds = dict.fromkeys(str(score["kind"]) for score in scores)
    result: dict[str, Any] = {}
    for kind in kinds:
        mine = [score for score in scores if score["kind"] == kind]
        iou = {(s["condition"], s["pair"]): s["iou"] for s in mine}
        result[kind] = {}
        for condition in dict.fromkeys(str(score["condition"]) for score in mine):
            rows = [score for score in mine if score["condition"] == condition]
            entry: dict[str, Any] = {"pairs": len(rows)}
            for figure in FIGURES:
                values = np.array([_figure(row, figure) for row in rows], dtype=np.float64)
                entry[figure] = mean_and_interval(values, seed, share=figure in _SHARES)
            gains = [r["iou"] - iou[SHARED_NOISE, r["pair"]] for r in rows if (SHARED_NOISE, r["pair"]) in iou]
            if condition != SHARED_NOISE and gains:
                entry["gain_over_shared_noise"] = mean_and_interval(np.array(gains), seed)
            result[kind][condition] = entry
    return result


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, such as 0.95, got {level!r}")


def _figure(row: Mapping[str, Any], figure: str) -> float:
    if figure == "success":
        return float(all(row[f"edit_{truth}"] for truth in _TRUTHS))
    return float(row[figure])


def mean_and_interval(values: np.ndarray, seed: int, *, share: bool = False) -> dict[str, float]:
    """``mean``, ``low`` and ``high`` of the 95 % interval of values ``[n]``, to four decimals.

    Args:
        values: zeros and ones where they make a ``share``.
        seed: of the bootstrap of a mean.
        share: whether the interval is :func:`share_interval`.
    """
    low, high = share_interval(int(values.sum()), len(values)) if share else bootstrap_interval(values, seed=seed)
    return {"mean": round(float(values.mean()), 4), "low": round(low, 4), "high": round(high, 4)}
