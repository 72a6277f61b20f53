"""Procedural scenes: one coloured object before a background, with its caption, silhouette and attributes.

A :class:`Scene` is a plain description; :func:`render` draws it (deterministic, antialiased, any size) and
:func:`caption` words it. The generator is what the embedded model is trained on and what edits are judged by.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .backdrops import BACKGROUNDS, draw_backdrop
from .shapes import NEUTRALS, OBJECTS, outline

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "OBJECTS",
    "RenderedScene",
    "Scene",
    "caption",
    "captions",
    "held_out",
    "phrasings",
    "prompt",
    "render",
    "sample_scene",
    "triples",
]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 36, 40),
    "orange": (245, 132, 30),
    "yellow": (250, 212, 44),
    "green": (36, 156, 72),
    "blue": (36, 92, 214),
    "purple": (126, 54, 178),
    "pink": (246, 132, 184),
    "black": (44, 44, 50),
}

_PLACES = {
    "beach": ("on the beach", "on a beach", "at the beach"),
    "desert": ("in the desert", "in a desert"),
    "meadow": ("in the meadow", "in a meadow"),
    "snow": ("in the snow", "on the snow"),
    "city": ("in the city", "in a city"),
}
_MEDIA = ("a photo of", "a photo of", "a picture of", "an image of", "a photograph of", "a drawing of", "a painting of")

# Objects stand on the ground or hang in the air; the first get a contact shadow.
_STANDING = frozenset({"car", "house", "boat", "mushroom", "cat"})
_UNIT = 0.29  # the unit frame's half width, as a fraction of the image
# Where things stand: below every background's horizon, its shore and its pavement.
_GROUND = (0.76, 0.90)
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Scene:
    """What is drawn, and where.

    Args:
        object, colour, background: names from :data:`OBJECTS`, :data:`COLOURS`, :data:`BACKGROUNDS`.
        x, y: the object's centre as fractions of width and height.
        scale: size relative to the object's usual one.
        angle: rotation in degrees, clockwise.
        flip: mirrored left to right.
        seed: fixes the variation of background and tint.
    """

    object: str
    colour: str
    background: str
    x: float = 0.5
    y: float = 0.56
    scale: float = 1.0
    angle: float = 0.0
    flip: bool = False
    seed: int = 0

    def attributes(self) -> dict[str, Any]:
        """The scene as a JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class RenderedScene:
    """A drawn scene.

    Args:
        image: uint8 ``[size, size, 3]``, RGB.
        mask: uint8 ``[size, size]``, how much of each pixel the object covers: 0 none, 255 all.
        scene: the description it was drawn from.
    """

    image: np.ndarray
    mask: np.ndarray
    scene: Scene


def triples(held: bool | None = None) -> list[tuple[str, str, str]]:
    """All (object, colour, background) triples; only those held out of training (or not) if ``held`` is given."""
    every = list(product(OBJECTS, COLOURS, BACKGROUNDS))
    return every if held is None else [t for t in every if held_out(*t) == held]


@cache
def _choices(held: bool | None) -> list[tuple[str, str, str]]:
    return triples(held)


def held_out(object: str, colour: str, background: str) -> bool:
    """Whether the diffusion model never trains on this triple; each of its three pairs does occur in training."""
    o, c, b = OBJECTS.index(object), list(COLOURS).index(colour), BACKGROUNDS.index(background)
    return (3 * o + c + 2 * b) % 10 == 7


def sample_scene(
    rng: np.random.Generator, held: bool | None = None, triple: tuple[str, str, str] | None = None
) -> Scene:
    """Draw a scene at random.

    Args:
        rng: where the draws come from.
        held: keeps to triples inside (or outside) the held-out set; ``None`` takes all.
        triple: (object, colour, background) to show, in place of a draw.
    """
    every = [triple] if triple is not None else _choices(held)
    object, colour, background = every[int(rng.integers(len(every)))]
    scale = float(rng.uniform(0.80, 1.15))
    reach, ground = _UNIT * scale, rng.uniform(*_GROUND)
    height, angle = rng.uniform(0.36, 0.60), rng.uniform(-12, 12)
    stands = object in _STANDING
    return Scene(
        object=object,
        colour=colour,
        background=background,
        x=float(rng.uniform(0.37, 0.63)),
        y=float(ground - _bottom(object) * reach if stands else height),
        scale=scale,
        # What stands hardly leans.
        angle=float(angle / 6 if stands else angle),
        flip=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**31)),
    )


def prompt(object: str, colour: str, background: str) -> str:
    """The plain wording: ``a photo of a red car on the beach``."""
    return f"a photo of {_article(colour)} {colour} {object} {_PLACES[background][0]}"


def phrasings(object: str, colour: str, background: str) -> list[str]:
    """Every full wording of a triple that training uses."""
    result = []
    for place in _PLACES[background]:
        thing = f"{_article(colour)} {colour} {object}"
        result += [f"{medium} {thing} {place}" for medium in dict.fromkeys(_MEDIA)]
        result += [f"{thing} {place}", f"there is {thing} {place}", f"{place}, {thing}", f"{place} there is {thing}"]
        result += [f"a {object} that is {colour} {place}", f"{colour} {object} {place}"]
    return result


def captions(object: str, colour: str, background: str) -> list[tuple[str, float]]:
    """The wordings of a triple with their shares in training: mostly full, now and then without colour or place."""
    thing = f"{_article(colour)} {colour} {object}"
    places = _PLACES[background]
    groups = (
        (0.04, [f"{medium} {thing}" for medium in _MEDIA]),
        (0.04, [f"{medium} a {object} {place}" for medium in _MEDIA for place in places]),
        (0.47, [f"{medium} {thing} {place}" for medium in _MEDIA for place in places]),
        (0.45, phrasings(object, colour, background)),
    )
    shares: dict[str, float] = {}
    for share, texts in groups:
        for text in texts:
            shares[text] = shares.get(text, 0.0) + share / len(texts)
    return list(shares.items())


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of :func:`captions` at random."""
    texts, shares = zip(*captions(scene.object, scene.colour, scene.background), strict=True)
    return str(rng.choice(texts, p=np.array(shares) / sum(shares)))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def render(scene: Scene, size: int = 96) -> RenderedScene:
    """Draw a scene.

    Args:
        scene: what to draw.
        size: width and height in pixels, at least 16.

    Returns:
        The image, its silhouette and the scene; equal arguments give equal bytes.

    Raises:
        ValueError: ``size`` is too small to show anything.
        KeyError: an unknown object, colour or background.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    rng = np.random.default_rng(scene.seed)
    fine = size * _SUPERSAMPLE
    tint = np.clip(np.asarray(COLOURS[scene.colour]) * rng.uniform(0.94, 1.06) + rng.uniform(-7, 7, 3), 0, 255)
    backdrop = draw_backdrop(scene.background, fine, rng)

    # The object stands on black, so averaging leaves it premultiplied by its coverage.
    layer, cover = Image.new("RGB", (fine, fine)), Image.new("L", (fine, fine))
    draw, draw_cover = ImageDraw.Draw(layer), ImageDraw.Draw(cover)
    fills = _fills(tint)
    for part in outline(scene.object):
        points = [tuple(p) for p in (_place(part.points, scene) * fine).tolist()]
        draw.polygon(points, fill=fills[part.role])
        draw_cover.polygon(points, fill=255)

    mask = np.asarray(cover.reduce(_SUPERSAMPLE))
    alpha = mask.astype(np.float32)[..., None] / 255
    ground = np.asarray(backdrop.reduce(_SUPERSAMPLE)).astype(np.float32)
    thing = np.asarray(layer.reduce(_SUPERSAMPLE)).astype(np.float32)
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = line[:, None], line[None, :]
    if scene.object in _STANDING:
        ground *= 1 - _shadow(scene, x, y)[..., None]
    # Light falls from above, a little from the left.
    down, right = (np.clip(d / (2 * _UNIT * scene.scale) + 0.5, 0, 1) for d in (y - scene.y, x - scene.x))
    shading = 1.14 - 0.26 * down - 0.08 * right
    image = ground * (1 - alpha) + thing * shading[..., None]
    return RenderedScene(np.clip(image.round(), 0, 255).astype(np.uint8), mask, scene)


def _fills(tint: np.ndarray) -> dict[str, tuple[int, int, int]]:
    shades = {"body": tint, "light": tint + 0.38 * (255 - tint), "shade": 0.74 * tint}
    fills = {role: tuple(round(float(c)) for c in colour) for role, colour in shades.items()}
    return {**fills, **NEUTRALS}  # type: ignore[dict-item]


def _place(points: np.ndarray, scene: Scene) -> np.ndarray:
    """Unit frame to fractions of the image: mirror, turn, scale, move."""
    angle = np.radians(scene.angle)
    x, y = points[:, 0] * (-1 if scene.flip else 1), points[:, 1]
    turned = np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=1)
    return turned * _UNIT * scene.scale + (scene.x, scene.y)


def _shadow(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    unit = _UNIT * scene.scale
    dx, dy = (x - scene.x) / (0.85 * unit), (y - scene.y - _bottom(scene.object) * unit) / (0.15 * unit)
    return 0.42 * np.exp(-(dx**2 + dy**2))


@cache
def _bottom(object: str) -> float:
    """The lowest point of an object, in the unit frame."""
    return max(float(part.points[:, 1].max()) for part in outline(object))
