"""Means of per-pair values, with bootstrap intervals that respect the pairing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .conditions import SHARED_NOISE

__all__ = ["FIGURES", "bootstrap_interval", "mean_and_interval", "summarise"]

_TRUTHS = ("object", "colour", "background")
FIGURES = (*(f"source_{t}" for t in _TRUTHS), *(f"edit_{t}" for t in _TRUTHS), "success", "iou", "outside_psnr")


def bootstrap_interval(
    values: np.ndarray, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values`` ``[n]``; a paired one, if they are differences.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected a non-empty vector of values, got shape {values.shape}")
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [values[rng.integers(len(values), size=(500, len(values)))].mean(axis=1) for _ in range(-(-resamples // 500))]
    )
    low, high = np.quantile(means[:resamples], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
                entry[figure] = mean_and_interval(
                    np.array([_figure(row, figure) for row in rows], dtype=np.float64), seed
                )
            gains = [r["iou"] - iou[SHARED_NOISE, r["pair"]] for r in rows if (SHARED_NOISE, r["pair"]) in iou]
            if condition != SHARED_NOISE and gains:
                entry["gain_over_shared_noise"] = mean_and_interval(np.array(gains), seed)
            result[kind][condition] = entry
    return result


def _figure(row: Mapping[str, Any], figure: str) -> float:
    if figure == "success":
        return float(all(row[f"edit_{truth}"] for truth in _TRUTHS))
    return float(row[figure])


def mean_and_interval(values: np.ndarray, seed: int) -> dict[str, float]:
    """``mean``, ``low`` and ``high`` of the 95 % bootstrap interval of values ``[n]``, to four decimals."""
    low, high = bootstrap_interval(values, seed=seed)
    return {"mean": round(float(values.mean()), 4), "low": round(low, 4), "high": round(high, 4)}
