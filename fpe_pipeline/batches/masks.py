"""What of a picture may change, as its list says it, cut as the picture is cut for the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..errors import InputError
from ..images.load import load_image
from .jobs import MaskSource

__all__ = ["PIE_SIDE", "from_runs", "mask_for"]

#: PIE-Bench's masks are of pictures of so many pixels a side.
PIE_SIDE = 512
_WHITE = 255


def mask_for(source: MaskSource, size: tuple[int, int]) -> np.ndarray:
    """What may change of a picture of ``size`` (width, height), as booleans [H, W].

    A mask that is a picture is white there, and is cut as a picture of its shape is.

    Raises:
        InputError: no picture, or runs outside of one.
    """
    if isinstance(source, str):
        mask = load_image(source, size, multiple=1)
    else:
        mask = Image.fromarray(from_runs(source).astype(np.uint8) * _WHITE).resize(size, Image.Resampling.NEAREST)
    return np.asarray(mask.convert("L")) > _WHITE // 2


def from_runs(runs: Sequence[int], side: int = PIE_SIDE) -> np.ndarray:
    """Booleans [side, side] of runs start, length, start, length … of a picture read row by row.

    The outermost pixels count as inside, as in PIE-Bench's own evaluation, whose annotations are wrong there.

    Raises:
        InputError: an odd number of values, or a run that starts outside.
    """
    values = np.asarray(runs)
    if values.ndim != 1 or values.size % 2 or (values.size and values.dtype.kind not in "iu"):
        raise InputError(f"expected a mask as pairs of start and length, got {values.size} values")
    flat = np.zeros(side * side, bool)
    for start, length in values.reshape(-1, 2):
        if not 0 <= start < flat.size or length < 0:
            raise InputError(f"a mask of {side} x {side} pixels has no run of {length} from pixel {start} on")
        flat[start : start + length] = True
    mask = flat.reshape(side, side)
    mask[[0, -1], :] = mask[:, [0, -1]] = True
    return mask
