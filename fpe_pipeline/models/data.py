"""A cache of rendered scenes on disk, so that drawing never holds training up."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np

from .scenes import Scene, render, sample_scene

__all__ = ["SceneCache", "render_cache"]

log = logging.getLogger(__name__)

_BLOCK = 256


@dataclass(frozen=True)
class SceneCache:
    """Rendered scenes.

    Attributes:
        images: uint8 ``[n, size, size, 3]``, memory-mapped.
        masks: uint8 ``[n, size, size]``, memory-mapped; 255 inside the object.
        scenes: the ``n`` descriptions.
    """

    images: np.ndarray
    masks: np.ndarray
    scenes: list[Scene]

    def __len__(self) -> int:
        return len(self.scenes)


def render_cache(
    folder: Path, count: int, size: int, *, seed: int = 0, held: bool | None = False, workers: int = 1
) -> SceneCache:
    """Render ``count`` scenes, or open them where an earlier call did.

    Scene ``i`` depends on ``seed`` and ``i`` alone: neither on ``count`` nor on ``workers``.

    Args:
        folder: where the cache lives; made if missing.
        count: number of scenes.
        size: pixels a side.
        seed: first half of every scene's seed.
        held: which triples to draw, as in :func:`~.scenes.sample_scene`.
        workers: processes that draw.

    Raises:
        ValueError: the folder holds a cache made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"count": count, "size": size, "seed": seed, "held": held}
    done = folder / "settings.json"
    if done.exists() and json.loads(done.read_text()) != settings:
        raise ValueError(f"{folder} holds {json.loads(done.read_text())}, not {settings}: choose another folder")
    scenes = [_scene(seed, index, held) for index in range(count)]
    mode: Literal["r", "w+"] = "r" if done.exists() else "w+"
    images = np.memmap(folder / "images.u8", np.uint8, mode, shape=(count, size, size, 3))
    masks = np.memmap(folder / "masks.u8", np.uint8, mode, shape=(count, size, size))
    if not done.exists():
        _fill(images, masks, scenes, size, workers)
        done.write_text(json.dumps(settings))
    return SceneCache(images, masks, scenes)


def _scene(seed: int, index: int, held: bool | None) -> Scene:
    return sample_scene(np.random.default_rng((seed, index)), held)


def _fill(images: np.ndarray, masks: np.ndarray, scenes: list[Scene], size: int, workers: int) -> None:
    jobs = [(start, scenes[start : start + _BLOCK], size) for start in range(0, len(scenes), _BLOCK)]

    def store(result: tuple[int, np.ndarray, np.ndarray]) -> None:
        start, block, cover = result
        images[start : start + len(block)], masks[start : start + len(block)] = block, cover
        if start // _BLOCK % 16 == 0:
            log.info("rendered %d of %d scenes", start + len(block), len(scenes))

    if workers <= 1:
        for job in jobs:
            store(_render_block(job))
        return
    with get_context("spawn").Pool(workers) as pool:
        for result in pool.imap_unordered(_render_block, jobs):
            store(result)


def _render_block(job: tuple[int, list[Scene], int]) -> tuple[int, np.ndarray, np.ndarray]:
    start, scenes, size = job
    rendered = [render(scene, size) for scene in scenes]
    return start, np.stack([r.image for r in rendered]), np.stack([r.mask for r in rendered])
