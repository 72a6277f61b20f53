"""How alike two pictures and two silhouettes are."""

from __future__ import annotations

import numpy as np

__all__ = ["iou", "psnr"]


def psnr(one: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float:
    """PSNR in dB of two uint8 pictures [h, w, 3], in the pixels of ``where``, bool [h, w]; at most 60.

    Eight-bit rounding alone leaves 59 dB; the cap keeps equal pictures from being infinite.
    """
    error = one.astype(np.float64) - other.astype(np.float64)
    error = error if where is None else error[where]
    mean_square = float(np.square(error).mean()) if error.size else 0.0
    return min(60.0, 10 * float(np.log10(255**2 / max(mean_square, 1e-9))))


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two silhouettes, bool [h, w].

    Two pictures without an object have nothing in common to keep, which is 0.
    """
    either = one | other
    return float((one & other).sum() / either.sum()) if either.any() else 0.0
