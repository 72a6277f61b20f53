"""What users of other tools pass, read once for all of them, or refused with what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..images.load import load_image, to_tensor, upright_size
from ..models.steps import StepWindow

__all__ = ["check_count", "check_made", "factor", "folder", "listed", "number", "numbers", "pixels", "shown", "window"]


def check_count(name: str, given: Any, count: int, what: str, source: str) -> None:
    """Raise ValueError for a list of other than so many of what belongs to steps.

    Args:
        name: of the argument.
        given: a list, or a tensor whose first axis is the list's.
        count: how many there have to be.
        what: they are.
        source: where the right list comes from.
    """
    number = len(given) if hasattr(given, "__len__") and not isinstance(given, str) else None
    if number != count:
        got = type(given).__name__ if number is None else f"{number} {what}"
        raise ValueError(
            f"{name}: expected {count} {what}, got {got}: pass the list that {source} gave, of as many steps"
        )


def check_made(what: str, given: Any) -> None:
    """Raise TypeError for what cannot be called, and for a class, which would make another of itself with each map."""
    if isinstance(given, type):
        raise TypeError(f"expected {what}, got the class {given.__name__} itself: make one, {given.__name__}(…)")
    if not callable(given):
        raise TypeError(f"expected {what}, got {type(given).__name__}")


def folder(name: str, value: Any) -> Path | None:
    """Where to write, or None; a number in its place would be a folder of that name.

    Raises:
        ValueError: anything else.
    """
    if value is None or isinstance(value, str | PathLike):
        return None if value is None else Path(value)
    raise ValueError(f"{name}: expected a folder's path or None, got {value!r}")


def listed(prompts: str | Sequence[str]) -> list[str]:
    """Prompts as a list; a text is one of them, not as many as it has letters.

    Raises:
        TypeError: something else than a text, or several.
        ValueError: none.
    """
    given = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else prompts
    if not isinstance(given, list) or not all(isinstance(prompt, str) for prompt in given):
        raise TypeError(f"expected prompts, a text or a list of texts, got {prompts!r}")
    if not given:
        raise ValueError("expected at least one prompt, got none")
    return given


def number(name: str, value: Any) -> int:
    """A whole number, of NumPy's and PyTorch's too, or written as a float.

    Raises:
        ValueError: anything else, such as a list, a text, or a fraction.
    """
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, bool) or not isinstance(plain, int | float) or plain % 1:  # true of NaN and of infinity
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    return int(plain)


def factor(name: str, value: Any) -> float:
    """A finite number, of NumPy's and PyTorch's too.

    Raises:
        ValueError: anything else, such as a list, a text, or NaN.
    """
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not math.isfinite(plain):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(plain)


def numbers(name: str, values: Any) -> list[int]:
    """Whole numbers of a list, a range, a tensor or whatever else can be gone through.

    Raises:
        ValueError: no list, or others in it.
    """
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, str) or not isinstance(plain, Iterable):
        raise ValueError(f"{name}: expected a list of whole numbers, got {values!r}: write [{values}] for one of them")
    return [number(name, value) for value in plain]


def pixels(image: Any) -> torch.Tensor:
    """A picture as an autoencoder takes it: [B, 3, H, W] in [-1, 1].

    Args:
        image: a tensor that is one already; or a PIL image or an array [H, W] or [H, W, 1 | 2 | 3 | 4], uint8, uint16
            or floats in [0, 1].

    Raises:
        TypeError: what is no picture.
        ValueError: a tensor or an array of another shape, or of other values.
    """
    if isinstance(image, torch.Tensor):
        # Resizing may overshoot a little; pictures of 0 to 255 are far beyond.
        values = f"{image.dtype} from {image.min().item():.4g} to {image.max().item():.4g}" if image.numel() else "none"
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point() or not bool(image.abs().max() < 2):
            raise ValueError(
                f"expected an image [B, 3, H, W] in [-1, 1], got a tensor {tuple(image.shape)} with values {values}: "
                "pass x / 127.5 - 1 of bytes, [None] of a single one"
            )
        return image
    if not isinstance(image, np.ndarray | Image.Image):
        raise TypeError(f"expected a PIL image, an array or a tensor, got {image!r}: open paths with PIL.Image.open")
    size: Any = upright_size(image) if isinstance(image, Image.Image) else image.shape[1::-1]
    return to_tensor(load_image(image, size, multiple=1))


def shown(image: Any) -> np.ndarray:
    """A picture as it is looked at: [H, W, 3], uint8.

    Args:
        image: a PIL image, an array [H, W] or [H, W, 1 | 2 | 3 | 4], or a tensor [C, H, W]: uint8, uint16 or floats in
            [0, 1].

    Raises:
        TypeError: what is no picture.
        ValueError: another shape, or other values.
    """
    if isinstance(image, torch.Tensor) and image.ndim == 3 and image.shape[0] > 4 >= image.shape[2]:
        image = image.cpu().numpy()  # [H, W, C], as arrays are
    if not isinstance(image, np.ndarray | torch.Tensor | Image.Image):
        raise TypeError(f"expected a PIL image, an array or a tensor, got {image!r}: open paths with PIL.Image.open")
    if isinstance(image, torch.Tensor):
        size: Any = tuple(image.shape[:-3:-1])
    else:
        size = upright_size(image) if isinstance(image, Image.Image) else image.shape[1::-1]
    return np.asarray(load_image(image, size, multiple=1))


def window(name: str, value: Any) -> StepWindow:
    """A share of the steps, or begin and end, of any kind of number.

    Raises:
        ValueError: anything else, such as a percentage, a text, or a begin after the end.
    """
    try:
        return StepWindow.parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
