"""Reading a user's picture: any mode, any size, turned the right way up, cut to what a model takes.

The rules, in order:

1. Of an animation the first frame counts. The EXIF orientation is applied.
2. Everything becomes 8-bit RGB: 16-bit values are divided by 257, floats in [0, 1] multiplied by 255, palettes and
   CMYK converted; what is transparent shows white.
3. The size is the given one; a side left out follows the aspect ratio; with neither, the picture keeps its aspect
   ratio and gets the model's own number of pixels. Each side that is not given is rounded to a multiple of the
   autoencoder's factor.
4. The picture is scaled (Lanczos) until it covers that size, and what stands over is cut off evenly at both ends.

A huge picture costs little more memory than Pillow's decoder takes for it, which is four bytes a pixel or fewer: it is
converted a band of rows at a time, and averaged down to no less than three times the size that it is scaled to.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..errors import InputError, refusals
from ..texts import check_no_address

__all__ = ["check_openable", "fitted_size", "from_array", "load_image", "to_tensor", "upright_size"]

# Pillow's own bound against files that unpack to more memory than a machine has.
PIXEL_LIMIT = 2 * (Image.MAX_IMAGE_PIXELS or 89478485)
WHITE = (255, 255, 255)
# Pictures of up to so many pixels are scaled from all of them; larger ones, as far as that leaves enough, from means.
ORDINARY_PIXELS = 2**24
BAND_PIXELS = 2**20
REDUCING_GAP = 3.0  # how much larger than its result Lanczos scaling starts at least
# What Pillow's decoders raise on damaged data, and on data that unpacks to more than they allow.
DECODER_ERRORS = (OSError, SyntaxError, EOFError, RuntimeError, ValueError, LookupError, TypeError)
# What turns a picture of an EXIF orientation the right way up; from 5 on it is stored on its side.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)


def load_image(
    image: Any,
    size: tuple[int | None, int | None] = (None, None),
    *,
    multiple: int = 8,
    pixels: int = 512 * 512,
) -> Image.Image:
    """Any picture as an RGB image of a size that a model takes; the module says by which rules.

    Args:
        image: a path, a PIL image, an array [H, W], [H, W, 1 | 2 | 3 | 4] or a tensor [C, H, W] or [1, C, H, W] with
            as many channels: uint8, uint16, or floats in [0, 1].
        size: (width, height) in pixels; None is a side to choose.
        multiple: pixels a latent pixel: what sides are multiples of.
        pixels: width × height where neither side is given.

    Raises:
        InputError: no such file, an address, not a picture, a damaged one, one too large to unpack, values or shapes
            that are no picture, a size that is no multiple.
    """
    name = f"'{image}'" if isinstance(image, str | Path) else "the image"
    opened = image
    if isinstance(image, str | Path):
        with refusals():
            check_no_address(image)
        with _decoding(name):
            opened = Image.open(image)
    elif isinstance(image, torch.Tensor | np.ndarray):
        opened = from_array(image)
    elif not isinstance(image, Image.Image):
        raise InputError(f"expected a path, a PIL image, an array or a tensor, got {type(image).__name__}")
    try:
        return _fit(opened, size, multiple, pixels, name, is_ours=opened is not image)
    finally:
        if opened is not image:
            opened.close()


def fitted_size(
    given: tuple[int, int], size: tuple[int | None, int | None], multiple: int, pixels: int
) -> tuple[int, int]:
    """(width, height) to cut a picture of size ``given`` to.

    Raises:
        InputError: a side of ``size`` that is no positive multiple, or one that follows from the picture's shape and is
            none of a model: filled up to its least, a picture of a line becomes thousands of times the model's own.
    """
    for name, side in zip(("width", "height"), size, strict=True):
        if side is not None and (side <= 0 or side % multiple):
            nearest = max(1, round(side / multiple)) * multiple
            raise InputError(f"{name} must be a positive multiple of {multiple} px, got {side}; use {nearest}")
    width, height = size
    aspect = given[0] / given[1]
    if width is not None or height is not None:
        wanted = (width or (height or 0) * aspect, height or (width or 0) / aspect)
    else:
        wanted = (math.sqrt(pixels * aspect), math.sqrt(pixels / aspect))
    if min(wanted) < multiple / 2:
        raise InputError(
            f"a picture of {given[0]}x{given[1]} pixels is too long for its width: at this size its shorter side would "
            f"be less than half of the {multiple} px that a model takes; cut it, or give both width and height"
        )
    across, down = (max(1, round(side / multiple)) * multiple for side in wanted)
    return across, down


def check_openable(size: tuple[int, int]) -> None:
    """Raise `InputError` for a (width, height) in pixels that could be made, if at all, and never opened again."""
    if size[0] * size[1] > PIXEL_LIMIT:
        side = math.isqrt(PIXEL_LIMIT)
        raise InputError(
            f"pictures have at most {PIXEL_LIMIT} pixels, some {side}x{side}, beyond which Pillow opens none; "
            f"got {size[0]}x{size[1]}; pass a smaller size"
        )


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as an autoencoder takes it: float32 [1, 3, H, W] in [-1, 1]."""
    values = torch.from_numpy(np.array(image, dtype=np.float32)) / 127.5 - 1.0  # [H, W, 3]
    return values.permute(2, 0, 1)[None].contiguous()


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """What decoders raise, as errors that say what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half of the limit is no reason yet
            yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name} unpacks to more than {PIXEL_LIMIT} pixels, which may be an attack on memory; scale it down "
            "first, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a picture that Pillow can read; pass a PNG, JPEG or WebP file") from error
    except DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:  # raised by the system, not by a decoder
            raise InputError(f"cannot read {name}: {error.strerror}; pass the path of a picture") from error
        reason = str(error) or type(error).__name__
        raise InputError(f"{name} is damaged: {reason}; save it again from the original") from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as a picture is shown; a camera may store it on its side."""
    return image.size[::-1] if _orientation(image) in _ON_ITS_SIDE else image.size


def _orientation(image: Image.Image) -> Any:
    """By EXIF's number, how a picture that is opened is yet to be turned."""
    if image.format == "TIFF":  # which Pillow turns itself while it unpacks, and then forgets the orientation
        image.load()
    return image.getexif().get(0x0112, 1)


def _fit(
    image: Image.Image, size: tuple[int | None, int | None], multiple: int, pixels: int, name: str, *, is_ours: bool
) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"{name} has no pixels: its size is {image.width}x{image.height}")
    with _decoding(name):
        orientation = _orientation(image)
        on_its_side, shown = orientation in _ON_ITS_SIDE, upright_size(image)
        across, down = fitted_size(shown, size, multiple, pixels)
        # A JPEG can be unpacked at a half, a quarter or an eighth of its size, which is all that scaling needs. The
        # caller's own picture would stay so small.
        scale = 2 * max(across / shown[0], down / shown[1])
        if is_ours and scale < 1:
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        image.load()
    width, height = image.size[::-1] if on_its_side else image.size
    factor = 1
    if width * height > ORDINARY_PIXELS:
        factor = max(1, int(min(width / across, height / down) / REDUCING_GAP))
    rgb = _reduced(image, factor)
    if orientation in TURNS:
        rgb = rgb.transpose(TURNS[orientation])
    if rgb.size == (across, down):
        return rgb
    # The last of a row of averages may stand for less than a pixel, and a turn may put it first.
    wide, high = width / factor, height / factor
    left = rgb.width - wide if orientation in (2, 3, 6, 7) else 0.0
    top = rgb.height - high if orientation in (3, 4, 7, 8) else 0.0
    ratio = max(across / wide, down / high)
    over, above = max(0.0, (wide - across / ratio) / 2), max(0.0, (high - down / ratio) / 2)
    box = (left + over, top + above, min(rgb.width, left + wide - over), min(rgb.height, top + high - above))
    return rgb.resize((across, down), Image.Resampling.LANCZOS, box=box, reducing_gap=REDUCING_GAP)


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """The image in RGB, ``factor`` × ``factor`` pixels averaged into one, made a band of rows at a time."""
    whole = Image.new("RGB", (math.ceil(image.width / factor), math.ceil(image.height / factor)))
    rows = max(1, BAND_PIXELS // (image.width * factor)) * factor
    for top in range(0, image.height, rows):
        band = _to_rgb(image.crop((0, top, image.width, min(top + rows, image.height))))
        whole.paste(band.reduce(factor), (0, top // factor))
    return whole


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return from_array(np.asarray(image)).convert("RGB")
    if image.mode == "La":  # grey, already multiplied by its transparency: Pillow converts it one step at a time
        image = image.convert("LA")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, (*WHITE, 255))
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def from_array(values: Any) -> Image.Image:
    """A PIL image of an array [H, W] or [H, W, C], or of a tensor [C, H, W] or [1, C, H, W]."""
    given = f"{type(values).__name__} of {values.dtype} and shape {list(values.shape)}"
    if isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        tensor = tensor[0] if tensor.ndim == 4 and tensor.shape[0] == 1 else tensor
        tensor = tensor.permute(1, 2, 0) if tensor.ndim == 3 else tensor
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    array: np.ndarray = values
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (2, 3, 4)):
        raise InputError(
            f"expected an array [H, W] or [H, W, 1 to 4], or a tensor [C, H, W] or [1, C, H, W], got a {given}"
        )
    if 0 in array.shape:
        raise InputError(f"the image has no pixels: it is a {given}")
    return Image.fromarray(_eight_bit(array, given))


def _eight_bit(array: np.ndarray, given: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    low, high = array.min(), array.max()
    # Pillow reads 16-bit PNGs into 32-bit integers.
    if array.dtype.kind in "ui" and low >= 0 and high <= 65535:
        return np.round(array / 257).astype(np.uint8)
    if array.dtype.kind == "f" and low >= 0 and high <= 1:  # false for NaN
        return np.round(array * 255).astype(np.uint8)
    raise InputError(
        f"expected uint8, uint16 or floats in [0, 1], got a {given} with values from {low} to {high}; "
        "rescale them, such as (x + 1) / 2 for values in [-1, 1]"
    )
