"""How far the images of a repeated run are from those of its record, and what may be why.

The same computation on the same machine gives the same bits. On another CPU, with another number of threads or another
version, sums are taken in another order and round differently, which a picture of 8 bits shows as single levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..images.distance import distance, pixel_hash

if TYPE_CHECKING:
    from .run import Run

__all__ = ["differences"]


def differences(run: Run, record: Mapping[str, Any], path: Path) -> str:
    """Which images of a repeated run differ from those of its record, by how much, and what may be why.

    Args:
        run: made from the settings of ``record``, and not yet written: it may replace the record's own images.
        record: of an earlier run.
        path: of the record, or of a picture that holds it; the record's images beside it, or the picture itself under
            whatever name, tell how far the new ones are from them.

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
    found = [f"{name} ({_how_far(files[name][0], path, name, expected)})" for name, expected in changed.items()]
    reasons = [
        f"{name.replace('_', ' ')} was {then} and is {now}"
        for part in ("versions", "machine")
        for name, now in made[part].items()
        if (then := record.get(part, {}).get(name)) != now
    ]
    why = "; ".join(reasons) or "the record names the same versions and machine"
    return f"these images differ from the record's: {', '.join(found)}; {why}"


def _how_far(image: Image.Image, record: Path, name: str, expected: str | None) -> str:
    """The distance to the record's picture of that name, or why there is none."""
    path = record.parent / name
    if not path.exists() and record.suffix.lower() == ".png":
        path = record  # named otherwise, as a batch names its pictures after jobs
    try:
        with Image.open(path) as opened:
            opened.load()
            if expected is None or pixel_hash(opened) != expected:
                return f"how far is not known: {path} is not the record's"
            return str(distance(image, opened)) if image.size == opened.size else f"its size was {opened.size}"
    except OSError:
        return f"how far is not known: {path} cannot be read"
