"""Files from a browser: measured before they are unpacked, and kept under names of ours.

A file of a hundred kilobytes can unpack to gigabytes. Pillow reads a picture's size from its first bytes; only what is
small enough by these is decoded, to RGB, and written anew, so that nothing of the file but its pixels is kept.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

from ..errors import InputError
from ..images.load import load_image
from ..runs.picture_record import is_picture

__all__ = ["FORMATS", "MOST_BYTES", "MOST_PIXELS", "admitted_photo", "admitted_record"]

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_BYTES = 20 << 20
MOST_PIXELS = 40_000_000
#: Longest side that is kept: more than any model here takes.
_LONGEST = 2048


def admitted_photo(path: Path, destination: Path) -> Path:
    """Write the picture of an upload to ``destination``, as an RGB PNG of at most 2048 pixels a side.

    Args:
        path: where the server put the upload; its name is the visitor's and is not used.
        destination: a file of the visitor's own folder.

    Raises:
        InputError: too many bytes or pixels, no picture, a damaged one.
    """
    width, height = _measured(path)
    scale = min(1.0, _LONGEST / max(width, height))
    with Image.open(path, formats=FORMATS) as opened:
        picture = load_image(opened, multiple=1, pixels=round(width * height * scale**2))
    destination.parent.mkdir(parents=True, exist_ok=True)
    picture.save(destination, format="PNG")
    return destination


def admitted_record(path: Path) -> Path:
    """An upload that may be read for a record: a PNG of few enough bytes and pixels, none of which is unpacked."""
    if not is_picture(path):
        raise InputError("this file is no PNG; drop one that was made here or by fpe edit")
    _measured(path)
    return path


def _measured(path: Path) -> tuple[int, int]:
    """(width, height) of a picture that may be unpacked."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise InputError(f"this file has {size / 2**20:.0f} MiB; pass one of at most {MOST_BYTES >> 20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(path, formats=FORMATS) as opened:
                width, height = opened.size
    except Image.DecompressionBombError:
        raise InputError(_too_large("far more")) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"this file is not a picture in a format that is read here; pass a {', '.join(FORMATS)} file"
        ) from error
    if width * height > MOST_PIXELS:
        raise InputError(_too_large(f"{width} x {height} = {width * height / 1e6:.0f} million"))
    return width, height


def _too_large(pixels: str) -> str:
    return f"this picture has {pixels} pixels; pass one of at most {MOST_PIXELS / 1e6:.0f} million, scaled down"
