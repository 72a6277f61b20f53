"""Outlines of the eight objects: each is a stack of closed polygons in a unit frame.

The frame's x and y run from about -1 to 1 with y pointing down; the renderer scales, turns, mirrors and places it.
Every part names a *role* rather than a colour: ``body``, ``light`` and ``shade`` follow the object's colour, the
others are neutral details. The union of all parts is the object's silhouette.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = ["NEUTRALS", "OBJECTS", "Part", "outline"]

NEUTRALS: dict[str, tuple[int, int, int]] = {
    "glass": (205, 228, 240),
    "dark": (58, 58, 66),
    "cream": (250, 243, 224),
    "wood": (134, 92, 58),
}


@dataclass(frozen=True)
class Part:
    """One filled polygon of an object.

    Args:
        role: ``body``, ``light`` or ``shade`` (tints of the object's colour) or a key of :data:`NEUTRALS`.
        points: float64 ``[n, 2]``, x and y in the unit frame.
    """

    role: str
    points: np.ndarray


def _polygon(role: str, *points: tuple[float, float]) -> Part:
    return Part(role, np.asarray(points, dtype=np.float64))


def _ellipse(
    role: str, x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0, count: int = 36
) -> Part:
    """Ellipse or, with angles in degrees clockwise from the right, the segment of one."""
    angle = np.radians(np.linspace(start, stop, count))
    return Part(role, np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1))


def _smooth(role: str, *points: tuple[float, float], steps: int = 8) -> Part:
    """Closed Catmull-Rom curve through the points: what organic outlines are made of."""
    knots = np.asarray(points, dtype=np.float64)
    before, after, beyond = np.roll(knots, 1, 0), np.roll(knots, -1, 0), np.roll(knots, -2, 0)
    t = np.linspace(0.0, 1.0, steps, endpoint=False)[None, :, None]
    p0, p1, p2, p3 = (p[:, None, :] for p in (before, knots, after, beyond))
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    return Part(role, curve.reshape(-1, 2))


def _wheel(x: float, y: float, radius: float) -> tuple[Part, Part]:
    return _ellipse("dark", x, y, radius, radius), _ellipse("cream", x, y, 0.5 * radius, 0.5 * radius)


def _car() -> tuple[Part, ...]:
    return (
        _polygon("body", (-0.62, 0.02), (-0.40, -0.46), (0.26, -0.46), (0.60, 0.02)),
        _smooth(
            "body",
            (-1.0, 0.30),
            (-0.99, 0.06),
            (-0.90, -0.04),
            (-0.30, -0.08),
            (0.50, -0.08),
            (0.88, 0.02),
            (1.02, 0.18),
            (1.0, 0.36),
            (0.5, 0.40),
            (-0.5, 0.40),
            (-0.95, 0.38),
        ),
        _polygon("glass", (-0.48, -0.04), (-0.33, -0.36), (-0.10, -0.36), (-0.10, -0.04)),
        _polygon("glass", (0.0, -0.04), (0.0, -0.36), (0.21, -0.36), (0.44, -0.04)),
        _polygon("shade", (-0.98, 0.22), (1.0, 0.22), (1.0, 0.29), (-0.98, 0.29)),
        _ellipse("cream", 0.90, 0.10, 0.09, 0.09),
        *(_ellipse("shade", x, 0.36, 0.32, 0.32, 180, 360) for x in (-0.55, 0.55)),
        *_wheel(-0.55, 0.38, 0.26),
        *_wheel(0.55, 0.38, 0.26),
    )


def _house() -> tuple[Part, ...]:
    window = [
        part
        for x in (-0.36, 0.36)
        for part in (
            _polygon("cream", (x - 0.17, 0.06), (x + 0.17, 0.06), (x + 0.17, 0.40), (x - 0.17, 0.40)),
            _polygon("glass", (x - 0.12, 0.11), (x + 0.12, 0.11), (x + 0.12, 0.35), (x - 0.12, 0.35)),
        )
    ]
    return (
        _polygon("wood", (0.34, -0.86), (0.54, -0.86), (0.54, -0.30), (0.34, -0.30)),
        _polygon("body", (-0.66, -0.15), (0.66, -0.15), (0.66, 0.76), (-0.66, 0.76)),
        _polygon("shade", (-0.86, -0.08), (0.0, -0.80), (0.86, -0.08)),
        *window,
        _polygon("wood", (-0.13, 0.34), (0.13, 0.34), (0.13, 0.76), (-0.13, 0.76)),
    )


def _boat() -> tuple[Part, ...]:
    return (
        _polygon("wood", (-0.04, -0.94), (0.04, -0.94), (0.04, 0.40), (-0.04, 0.40)),
        _smooth("light", (0.06, -0.88), (0.44, -0.40), (0.74, 0.18), (0.40, 0.23), (0.06, 0.22), (0.06, -0.30)),
        _polygon("body", (-0.08, -0.68), (-0.08, 0.22), (-0.64, 0.22)),
        _polygon("body", (-0.94, 0.32), (0.98, 0.32), (0.62, 0.78), (-0.66, 0.78)),
        _polygon("cream", (-0.90, 0.38), (0.94, 0.38), (0.88, 0.46), (-0.84, 0.46)),
    )


def _rocket() -> tuple[Part, ...]:
    return (
        _polygon("dark", (-0.16, 0.62), (0.16, 0.62), (0.22, 0.82), (-0.22, 0.82)),
        _polygon("shade", (-0.24, 0.14), (-0.60, 0.52), (-0.60, 0.86), (-0.20, 0.62)),
        _polygon("shade", (0.24, 0.14), (0.60, 0.52), (0.60, 0.86), (0.20, 0.62)),
        _smooth(
            "body",
            (0.0, -1.02),
            (0.17, -0.74),
            (0.31, -0.32),
            (0.33, 0.10),
            (0.24, 0.68),
            (-0.24, 0.68),
            (-0.33, 0.10),
            (-0.31, -0.32),
            (-0.17, -0.74),
        ),
        _ellipse("cream", 0.0, -0.22, 0.19, 0.19),
        _ellipse("glass", 0.0, -0.22, 0.13, 0.13),
        _polygon("cream", (-0.29, 0.38), (0.29, 0.38), (0.28, 0.47), (-0.28, 0.47)),
    )


def _balloon() -> tuple[Part, ...]:
    envelope = (
        (0.0, -0.98), (0.40, -0.86), (0.66, -0.52), (0.64, -0.12), (0.38, 0.22), (0.17, 0.46),
        (-0.17, 0.46), (-0.38, 0.22), (-0.64, -0.12), (-0.66, -0.52), (-0.40, -0.86),
    )  # fmt: skip
    stripe = tuple((0.42 * x, y) for x, y in envelope)
    return (
        _polygon("wood", (-0.16, 0.40), (-0.11, 0.40), (-0.11, 0.70), (-0.16, 0.70)),
        _polygon("wood", (0.11, 0.40), (0.16, 0.40), (0.16, 0.70), (0.11, 0.70)),
        _smooth("body", *envelope),
        _smooth("light", *stripe),
        _polygon("wood", (-0.20, 0.66), (0.20, 0.66), (0.16, 0.94), (-0.16, 0.94)),
    )


def _mushroom() -> tuple[Part, ...]:
    return (
        _smooth(
            "cream",
            (-0.20, -0.10),
            (0.20, -0.10),
            (0.22, 0.35),
            (0.32, 0.76),
            (0.0, 0.82),
            (-0.32, 0.76),
            (-0.22, 0.35),
        ),
        _smooth(
            "body",
            (-0.90, 0.06),
            (-0.80, -0.36),
            (-0.46, -0.68),
            (0.0, -0.78),
            (0.46, -0.68),
            (0.80, -0.36),
            (0.90, 0.06),
            (0.48, 0.14),
            (0.0, 0.10),
            (-0.48, 0.14),
        ),
        _ellipse("cream", -0.36, -0.30, 0.15, 0.14),
        _ellipse("cream", 0.16, -0.46, 0.14, 0.12),
        _ellipse("cream", 0.50, -0.12, 0.13, 0.12),
    )


def _cat() -> tuple[Part, ...]:
    return (
        _smooth(
            "shade",
            (0.30, 0.56), (0.58, 0.52), (0.72, 0.28), (0.66, 0.0), (0.78, -0.08), (0.90, 0.22), (0.82, 0.58),
            (0.56, 0.78), (0.30, 0.78),
        ),
        _smooth(
            "body",
            (0.0, -0.16), (0.30, 0.06), (0.46, 0.48), (0.44, 0.80), (0.0, 0.84), (-0.44, 0.80), (-0.46, 0.48),
            (-0.30, 0.06),
        ),
        _polygon("body", (-0.42, -0.96), (-0.08, -0.66), (-0.40, -0.36)),
        _polygon("body", (0.42, -0.96), (0.08, -0.66), (0.40, -0.36)),
        _ellipse("body", 0.0, -0.40, 0.43, 0.36),
        _ellipse("light", 0.0, 0.42, 0.20, 0.30),
        _ellipse("cream", -0.18, -0.45, 0.10, 0.11),
        _ellipse("cream", 0.18, -0.45, 0.10, 0.11),
        _ellipse("dark", -0.17, -0.44, 0.05, 0.08),
        _ellipse("dark", 0.19, -0.44, 0.05, 0.08),
        _ellipse("cream", 0.0, -0.22, 0.13, 0.09),
        _ellipse("dark", 0.0, -0.27, 0.05, 0.04),
    )  # fmt: skip


def _fish() -> tuple[Part, ...]:
    return (
        _smooth("shade", (-0.52, 0.0), (-0.80, -0.34), (-1.04, -0.46), (-0.92, 0.0), (-1.04, 0.46), (-0.80, 0.34)),
        _smooth("shade", (-0.32, -0.30), (-0.10, -0.64), (0.26, -0.62), (0.42, -0.30), (0.0, -0.20)),
        _smooth("shade", (-0.10, 0.34), (-0.22, 0.62), (0.08, 0.58), (0.24, 0.34)),
        _smooth(
            "body",
            (-0.66, 0.0), (-0.36, -0.32), (0.10, -0.44), (0.58, -0.34), (0.94, 0.0), (0.58, 0.34), (0.10, 0.44),
            (-0.36, 0.32),
        ),
        _smooth("light", (0.10, -0.38), (0.22, -0.20), (0.22, 0.20), (0.10, 0.38), (-0.06, 0.24), (-0.06, -0.24)),
        _ellipse("cream", 0.56, -0.10, 0.13, 0.13),
        _ellipse("dark", 0.59, -0.10, 0.07, 0.07),
    )  # fmt: skip


_OUTLINES = {
    "car": _car,
    "house": _house,
    "boat": _boat,
    "rocket": _rocket,
    "balloon": _balloon,
    "mushroom": _mushroom,
    "cat": _cat,
    "fish": _fish,
}

OBJECTS: tuple[str, ...] = tuple(_OUTLINES)


@cache
def outline(name: str) -> tuple[Part, ...]:
    """Parts of an object from back to front; ``name`` is one of :data:`OBJECTS` (``KeyError`` otherwise)."""
    return _OUTLINES[name]()
