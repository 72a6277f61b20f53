"""The record of a run inside each of its pictures, so that one picture is enough to repeat it.

A PNG holds text beside its pixels. What stands there is the run's record without times, so that the same run gives the
same file, and with the name of the picture that it stands in. A real image is named as the file beside the pictures:
what is handed on says nothing of the folders that it came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ..errors import InputError

__all__ = ["KEYWORD", "PHOTO", "is_picture", "picture_text", "png_info", "with_photo_beside"]

#: What the text is called in a PNG.
KEYWORD = "fpe"
#: The file of a run that holds the real image as it was cut for the model.
PHOTO = "photo.png"
_PNG = b"\x89PNG\r\n\x1a\n"
#: Of a run; another one of the same settings has others.
_PASSING = ("created", "seconds")


def png_info(record: Mapping[str, Any], name: str) -> PngInfo:
    """What Pillow writes into the PNG ``name`` of a run.

    Args:
        record: of the run, as `run.json` holds it.
        name: of the picture's file, for whoever finds it renamed.
    """
    lasting = {key: value for key, value in record.items() if key not in _PASSING}
    if lasting["settings"]["image"] is not None:
        lasting["settings"] = lasting["settings"] | {"image": PHOTO}
    info = PngInfo()
    info.add_text(KEYWORD, json.dumps(lasting | {"picture": name}, allow_nan=False), zip=True)
    return info


def is_picture(path: Path) -> bool:
    """Whether a file begins as a PNG does; a file that cannot be read does not."""
    try:
        with path.open("rb") as file:
            return file.read(len(_PNG)) == _PNG
    except OSError:
        return False


def picture_text(path: Path) -> str:
    """The record, as JSON, that a PNG holds; no pixel of it is unpacked.

    Raises:
        InputError: a damaged file, or a picture without a record.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            text = picture.info.get(KEYWORD)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"'{path}' is a damaged picture: {error}; pass one as fpe wrote it") from error
    if not isinstance(text, str):
        raise InputError(
            f"'{path}' is a picture without a record: it was not made by fpe, or saved anew by a program that leaves "
            "texts out; pass one as fpe wrote it, or the run.json beside it"
        )
    return text


def with_photo_beside(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """The record of a picture at ``path``, whose real image is the file beside it."""
    settings = record.get("settings")
    if isinstance(settings, dict) and settings.get("image") == PHOTO:
        record["settings"] = settings | {"image": str(path.resolve().parent / PHOTO)}
    return record
