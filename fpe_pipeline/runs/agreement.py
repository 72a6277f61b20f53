"""How far the images of a repeated run are from those of its record, and what may be why.

The same computation on the same machine gives the same bits. On another CPU, with another number of threads or another
version, sums are taken in another order and round differently, which a picture of 8 bits shows as single levels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from .run import Run

__all__ = ["Distance", "differences", "distance", "pixel_hash"]

LEVELS = 255


@dataclass(frozen=True)
class Distance:
    """Between two RGB images of one size.

    Args:
        levels: the largest difference of a value, of 255.
        psnr: peak signal-to-noise ratio in dB; infinite for equal images.
    """

    levels: int
    psnr: float

    def __str__(self) -> str:
        return f"at most {self.levels} of {LEVELS} levels, {self.psnr:.1f} dB"


def distance(image: Image.Image, other: Image.Image) -> Distance:
    """How far two images are from one another.

    Raises:
        ValueError: images of two sizes.
    """
    if image.size != other.size:
        raise ValueError(f"expected images of one size, received {image.size} and {other.size} (width, height)")
    difference = np.asarray(image.convert("RGB"), np.int16) - np.asarray(other.convert("RGB"), np.int16)
    error = float(np.mean(np.square(difference, dtype=np.float64)))
    psnr = 10 * math.log10(LEVELS**2 / error) if error else math.inf
    return Distance(int(np.abs(difference).max()), psnr)


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 (hex) of size and RGB pixels: independent of how the file was compressed."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}\n".encode() + rgb.tobytes()).hexdigest()


def differences(run: Run, record: Mapping[str, Any], folder: Path) -> str:
    """Which images of a repeated run differ from those of its record, by how much, and what may be why.

    Args:
        run: made from the settings of ``record``, and not yet written: it may replace the record's own images.
        record: of an earlier run.
        folder: where the record lies; its images beside it tell how far the new ones are from them.

    Returns:
        One line; empty where every image is that of the record, bit for bit.
    """
    made, before = run.record(), record.get("images", {})
    files = run.files()
    changed = {
        name: before.get(name, {}).get("pixels_sha256")
        for name, image in made["images"].items()
        if image["pixels_sha256"] != before.get(name, {}).get("pixels_sha256")
    }
    if not changed:
        return ""
    found = [f"{name} ({_how_far(files[name][0], folder / name, expected)})" for name, expected in changed.items()]
    reasons = [
        f"{name.replace('_', ' ')} was {then} and is {now}"
        for part in ("versions", "machine")
        for name, now in made[part].items()
        if (then := record.get(part, {}).get(name)) != now
    ]
    why = "; ".join(reasons) or "the record names the same versions and machine"
    return f"these images differ from the record's: {', '.join(found)}; {why}"


def _how_far(image: Image.Image, path: Path, expected: str | None) -> str:
    """The distance to the picture at ``path``, or why there is none."""
    try:
        with Image.open(path) as opened:
            opened.load()
            if expected is None or pixel_hash(opened) != expected:
                return f"how far is not known: {path} is not the record's"
            return str(distance(image, opened)) if image.size == opened.size else f"its size was {opened.size}"
    except OSError:
        return f"how far is not known: {path} cannot be read"
