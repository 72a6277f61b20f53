"""The five backgrounds, drawn on a supersampled canvas with a little variation in each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["BACKGROUNDS", "draw_backdrop"]

RGB = tuple[float, float, float]


def _jitter(rng: np.random.Generator, colour: RGB, amount: float = 5.0) -> tuple[int, int, int]:
    shift = rng.uniform(-amount, amount, 3)
    return tuple(int(np.clip(c + s, 0, 255)) for c, s in zip(colour, shift, strict=True))  # type: ignore[return-value]


def _gradient(size: int, top: RGB, bottom: RGB, until: float) -> Image.Image:
    """Vertical gradient that reaches ``bottom`` at height ``until`` (a fraction of the canvas)."""
    weight = np.clip(np.arange(size) / (until * size), 0, 1)[:, None]
    rows = (1 - weight) * np.asarray(top) + weight * np.asarray(bottom)
    column = Image.fromarray(rows.round().astype(np.uint8)[:, None, :])
    return column.resize((size, size), Image.Resampling.NEAREST)


def _ridge(size: int, base: float, waves: list[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """Polygon of everything below a sum of sines; waves are (amplitude, cycles, phase), heights are fractions."""
    x = np.linspace(0, 1, 49)
    y = sum((a * np.sin(2 * np.pi * (c * x + p)) for a, c, p in waves), np.full_like(x, base))
    return [*zip((x * size).tolist(), (y * size).tolist(), strict=True), (size, size), (0, size)]


def _disc(draw: ImageDraw.ImageDraw, size: int, x: float, y: float, r: float, colour: tuple[int, int, int]) -> None:
    draw.ellipse([(x - r) * size, (y - r) * size, (x + r) * size, (y + r) * size], fill=colour)


def _cloud(draw: ImageDraw.ImageDraw, size: int, x: float, y: float, scale: float) -> None:
    for dx, dy, r in ((-0.07, 0.01, 0.035), (0.0, -0.01, 0.05), (0.07, 0.01, 0.035)):
        _disc(draw, size, x + scale * dx, y + scale * dy, scale * r, (250, 252, 255))


def _beach(size: int, rng: np.random.Generator) -> Image.Image:
    horizon = 0.42 + rng.uniform(-0.03, 0.03)
    image = _gradient(size, _jitter(rng, (112, 190, 240)), _jitter(rng, (206, 234, 248)), horizon)
    draw = ImageDraw.Draw(image)
    _disc(draw, size, rng.uniform(0.10, 0.90), rng.uniform(0.10, 0.16), 0.065, (255, 236, 150))
    draw.rectangle([0, horizon * size, size, size], fill=_jitter(rng, (42, 150, 190)))
    shore = horizon + 0.17
    phase = rng.uniform(0, 1)
    draw.polygon(_ridge(size, horizon + 0.09, [(0.008, 2, phase)]), fill=_jitter(rng, (84, 186, 206)))
    draw.polygon(_ridge(size, shore - 0.02, [(0.016, 1.5, phase)]), fill=(244, 250, 250))
    draw.polygon(_ridge(size, shore, [(0.016, 1.5, phase)]), fill=_jitter(rng, (240, 216, 164)))
    return image


def _desert(size: int, rng: np.random.Generator) -> Image.Image:
    image = _gradient(size, _jitter(rng, (246, 186, 150)), _jitter(rng, (253, 232, 204)), 0.5)
    draw = ImageDraw.Draw(image)
    _disc(draw, size, rng.uniform(0.10, 0.90), rng.uniform(0.12, 0.20), 0.08, (255, 246, 214))
    phase = rng.uniform(0, 1)
    base = 0.46 + rng.uniform(-0.03, 0.03)
    draw.polygon(_ridge(size, base, [(0.035, 1.2, phase)]), fill=_jitter(rng, (228, 188, 138)))
    draw.polygon(_ridge(size, base + 0.13, [(0.04, 0.9, phase + 0.45)]), fill=_jitter(rng, (214, 168, 116)))
    draw.polygon(_ridge(size, base + 0.30, [(0.03, 0.8, phase + 0.1)]), fill=_jitter(rng, (196, 148, 98)))
    return image


def _meadow(size: int, rng: np.random.Generator) -> Image.Image:
    image = _gradient(size, _jitter(rng, (126, 190, 246)), _jitter(rng, (222, 240, 252)), 0.5)
    draw = ImageDraw.Draw(image)
    _cloud(draw, size, rng.uniform(0.12, 0.38), rng.uniform(0.10, 0.18), 1.1)
    _cloud(draw, size, rng.uniform(0.62, 0.88), rng.uniform(0.12, 0.24), 0.9)
    phase = rng.uniform(0, 1)
    base = 0.46 + rng.uniform(-0.03, 0.03)
    draw.polygon(_ridge(size, base, [(0.035, 1.3, phase)]), fill=_jitter(rng, (148, 196, 116)))
    draw.polygon(_ridge(size, base + 0.10, [(0.03, 1.0, phase + 0.4)]), fill=_jitter(rng, (120, 182, 88)))
    draw.polygon(_ridge(size, base + 0.26, [(0.02, 0.8, phase + 0.7)]), fill=_jitter(rng, (96, 164, 68)))
    return image


def _snow(size: int, rng: np.random.Generator) -> Image.Image:
    image = _gradient(size, _jitter(rng, (150, 178, 214)), _jitter(rng, (226, 234, 246)), 0.5)
    draw = ImageDraw.Draw(image)
    base = 0.52 + rng.uniform(-0.02, 0.02)
    for x, height, width in ((0.22, 0.30, 0.30), (0.80, 0.34, 0.34), (0.52, 0.20, 0.24)):
        x += rng.uniform(-0.07, 0.07)
        height += rng.uniform(-0.03, 0.03)
        peak, left, right = (x, base - height), (x - width, base + 0.02), (x + width, base + 0.02)
        draw.polygon([(px * size, py * size) for px, py in (peak, left, right)], fill=_jitter(rng, (118, 136, 170)))
        cap = [(x + 0.36 * (qx - x), peak[1] + 0.36 * (qy - peak[1])) for qx, qy in (left, right)]
        tip = (peak, cap[0], (x, base - 0.54 * height), cap[1])
        draw.polygon([(px * size, py * size) for px, py in tip], fill=(248, 250, 253))
    phase = rng.uniform(0, 1)
    draw.polygon(_ridge(size, base, [(0.015, 1.2, phase)]), fill=_jitter(rng, (226, 234, 246), 3))
    draw.polygon(_ridge(size, base + 0.20, [(0.02, 0.9, phase + 0.5)]), fill=_jitter(rng, (242, 246, 252), 3))
    return image


def _city(size: int, rng: np.random.Generator) -> Image.Image:
    image = _gradient(size, _jitter(rng, (168, 168, 206)), _jitter(rng, (244, 216, 206)), 0.6)
    draw = ImageDraw.Draw(image)
    ground = 0.62 + rng.uniform(-0.02, 0.02)
    for colour, low, high in (((150, 150, 176), 0.30, 0.46), ((112, 116, 142), 0.14, 0.32)):
        fill, x = _jitter(rng, colour), rng.uniform(-0.10, 0.0)
        while x < 1:
            width, height = rng.uniform(0.15, 0.22), rng.uniform(low, high)
            draw.rectangle([x * size, (ground - height) * size, (x + width) * size, ground * size], fill=fill)
            x += width + rng.uniform(0.0, 0.04)
    draw.rectangle([0, ground * size, size, size], fill=_jitter(rng, (178, 176, 176)))
    draw.rectangle([0, (ground + 0.07) * size, size, size], fill=_jitter(rng, (104, 106, 114)))
    offset = rng.uniform(0, 0.24)
    for i in range(-1, 5):
        x = offset + 0.24 * i
        draw.rectangle([x * size, 0.88 * size, (x + 0.13) * size, 0.905 * size], fill=(232, 228, 214))
    return image


_DRAW: dict[str, Callable[[int, np.random.Generator], Image.Image]] = {
    "beach": _beach,
    "desert": _desert,
    "meadow": _meadow,
    "snow": _snow,
    "city": _city,
}

BACKGROUNDS: tuple[str, ...] = tuple(_DRAW)


def draw_backdrop(name: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Background ``name`` (one of :data:`BACKGROUNDS`) as an RGB image of ``size`` by ``size`` pixels."""
    return _DRAW[name](size, rng)
