"""How far two pictures are from one another, and what tells whether they are the same."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

__all__ = ["Distance", "distance", "pixel_hash"]

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
        raise ValueError(f"expected images of one size, got {image.size} and {other.size} (width, height)")
    difference = np.asarray(image.convert("RGB"), np.int16) - np.asarray(other.convert("RGB"), np.int16)
    error = float(np.mean(np.square(difference, dtype=np.float64)))
    psnr = 10 * math.log10(LEVELS**2 / error) if error else math.inf
    return Distance(int(np.abs(difference).max()), psnr)


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 (hex) of size and RGB pixels: independent of how the file was compressed."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}\n".encode() + rgb.tobytes()).hexdigest()
