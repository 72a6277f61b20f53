"""A cache of rendered scenes on disk, drawn by processes of their own while training already reads its beginning."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ...atomic_folder import write_text
from ..scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS, Scene, render, sample_scene

__all__ = ["Rendering", "SceneCache", "drawn_scenes", "render_cache", "start_rendering"]

log = logging.getLogger(__name__)

_BLOCK = 64
_WORKERS = 15
_ROW = np.dtype(
    [(name, "i4") for name in ("object", "colour", "background", "flip", "seed")]
    + [(name, "f8") for name in ("x", "y", "scale", "angle")]
)
_WORDS = {"object": OBJECTS, "colour": tuple(COLOURS), "background": BACKGROUNDS}


@dataclass(frozen=True)
class SceneCache:
    """Rendered scenes.

    Args:
        images: uint8 ``[n, size, size, 3]``, memory-mapped.
        masks: uint8 ``[n, size, size]``, memory-mapped; 255 inside the object.
        rows: what they were drawn from, a structured array ``[n]``.
    """

    images: np.ndarray
    masks: np.ndarray
    rows: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def scenes(self) -> list[Scene]:
        """The ``n`` descriptions."""
        return [_from_row(row) for row in self.rows]

    @property
    def labels(self) -> np.ndarray:
        """Indices of object, colour and background of every scene: int64 ``[n, 3]``."""
        return np.stack([self.rows[name] for name in _WORDS], axis=1).astype(np.int64)

    def first(self, count: int) -> SceneCache:
        """The first ``count`` scenes."""
        return SceneCache(self.images[:count], self.masks[:count], self.rows[:count])


class Rendering:
    """Scenes that are being drawn by processes of their own.

    Args:
        cache: what they fill.
        folder: where it lives.
        settings: what it was asked for.
        workers: the processes, each with the blocks that it draws; none where the cache is complete.
    """

    def __init__(
        self, cache: SceneCache, folder: Path, settings: dict[str, object], workers: list[subprocess.Popen[str]]
    ) -> None:
        self.cache, self._folder, self._settings, self._workers = cache, folder, settings, workers
        self._lock, self._done = threading.Lock(), set() if workers else set(range(_blocks(len(cache))))
        self._prefix, self._begun = 0, time.monotonic()
        self._readers = [threading.Thread(target=self._read, args=(worker,), daemon=True) for worker in workers]
        for reader in self._readers:
            reader.start()

    def _read(self, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            with self._lock:
                self._done.add(int(line))

    @property
    def ready(self) -> int:
        """How many scenes, from the first on, are drawn."""
        with self._lock:
            while self._prefix in self._done:
                self._prefix += 1
        return min(self._prefix * _BLOCK, len(self.cache))

    def wait(self, count: int | None = None, seconds: float = math.inf) -> int:
        """Wait for ``count`` scenes (all by default), at most so long; returns how many there are.

        Raises:
            RuntimeError: a process that draws ended without having drawn its share.
        """
        wanted, limit = len(self.cache) if count is None else min(count, len(self.cache)), time.monotonic() + seconds
        reported = time.monotonic()
        while (ready := self.ready) < wanted and time.monotonic() < limit:
            self._check()
            if time.monotonic() - reported > 10:
                log.info("rendered %d of %d scenes", ready, len(self.cache))
                reported = time.monotonic()
            time.sleep(0.02)
        if ready == len(self.cache):
            self._finish()
        return ready

    def _check(self) -> None:
        failed = [worker for worker in self._workers if worker.poll() not in (None, 0)]
        if failed:
            self.stop()
            raise RuntimeError(f"a process that renders scenes ended with status {failed[0].returncode}; see above")

    def _finish(self) -> None:
        if self._workers:
            for worker in self._workers:
                worker.wait()
            seconds, count = time.monotonic() - self._begun, len(self.cache)
            log.info("rendered %d scenes in %.1f s, %d processes", count, seconds, len(self._workers))
            self._workers = []
            write_text(self._folder / "settings.json", json.dumps(self._settings))

    def stop(self) -> None:
        """End the processes; what they have not drawn stays empty."""
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.wait()


@contextmanager
def drawn_scenes(work: Path, scenes: int, held_out: int, size: int, seed: int) -> Iterator[tuple[Rendering, Rendering]]:
    """Scenes to train on and held-out ones, drawn below a folder as long as the ``with`` block lasts."""
    workers = _processes()
    held = start_rendering(work / "held_out", held_out, size, seed=seed + 1, held=True, workers=min(4, workers))
    drawn = start_rendering(work / "scenes", scenes, size, seed=seed, workers=workers)
    try:
        yield drawn, held
    finally:
        held.stop()
        drawn.stop()


def _processes() -> int:
    """How many may draw here: one core is left to who asks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_WORKERS, max(1, cores - 1))


def render_cache(
    folder: Path, count: int, size: int, *, seed: int = 0, held: bool | None = False, workers: int = 1
) -> SceneCache:
    """Render ``count`` scenes, or open them where an earlier call did; arguments as for :func:`start_rendering`."""
    rendering = start_rendering(folder, count, size, seed=seed, held=held, workers=workers)
    rendering.wait()
    return rendering.cache


def start_rendering(
    folder: Path, count: int, size: int, *, seed: int = 0, held: bool | None = False, workers: int = 1
) -> Rendering:
    """Begin to render ``count`` scenes, or open them where an earlier call did.

    Scene ``i`` depends on ``seed`` and ``i`` alone: neither on ``count`` nor on ``workers``.

    Args:
        folder: where the cache lives; made if missing.
        count: number of scenes.
        size: pixels a side.
        seed: first half of every scene's seed.
        held: which triples to draw, as in :func:`~.scenes.sample_scene`.
        workers: processes that draw; few scenes are drawn in this one.

    Raises:
        ValueError: the folder holds a cache made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, object] = {"count": count, "size": size, "seed": seed, "held": held}
    done = folder / "settings.json"
    if done.exists() and json.loads(done.read_text()) != settings:
        raise ValueError(f"{folder} holds {json.loads(done.read_text())}, not {settings}: choose another folder")
    if done.exists():
        return Rendering(_open(folder, count, size, "r"), folder, settings, [])
    cache = _open(folder, count, size, "w+")
    if count <= 4 * _BLOCK:
        for block in range(_blocks(count)):
            _fill(cache, block, seed, held)
        write_text(done, json.dumps(settings))
        return Rendering(cache, folder, settings, [])
    # Processes of their own rather than a pool's: they import what draws and nothing else, and start at once.
    arguments = [str(folder), json.dumps(settings), str(workers)]
    command = [sys.executable, "-m", "fpe_pipeline.embedded.training.data", *arguments]
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(index)], stdout=subprocess.PIPE, text=True, env=environment)
        for index in range(workers)
    ]
    return Rendering(cache, folder, settings, processes)


def _open(folder: Path, count: int, size: int, mode: str) -> SceneCache:
    shapes = {"images.u8": (count, size, size, 3), "masks.u8": (count, size, size)}
    images, masks = (np.memmap(folder / name, np.uint8, mode, shape=shape) for name, shape in shapes.items())  # type: ignore[call-overload]
    return SceneCache(images, masks, np.memmap(folder / "scenes.rows", _ROW, mode, shape=(count,)))  # type: ignore[call-overload]


def _blocks(count: int) -> int:
    return -(-count // _BLOCK)


def _fill(cache: SceneCache, block: int, seed: int, held: bool | None) -> None:
    for index in range(block * _BLOCK, min((block + 1) * _BLOCK, len(cache))):
        drawn = render(sample_scene(np.random.default_rng((seed, index)), held), cache.images.shape[1])
        cache.images[index], cache.masks[index] = drawn.image, drawn.mask
        cache.rows[index] = _to_row(drawn.scene)


def _to_row(scene: Scene) -> tuple[float, ...]:
    words = (_WORDS[name].index(getattr(scene, name)) for name in _WORDS)
    return (*words, scene.flip, scene.seed, scene.x, scene.y, scene.scale, scene.angle)


def _from_row(row: np.void) -> Scene:
    object, colour, background = (known[row[name]] for name, known in _WORDS.items())
    x, y, scale, angle = (float(row[name]) for name in ("x", "y", "scale", "angle"))
    return Scene(object, colour, background, x, y, scale, angle, bool(row["flip"]), int(row["seed"]))


def _drawn_blocks(folder: Path, settings: dict[str, int], workers: int, index: int) -> Iterator[int]:
    cache = _open(folder, settings["count"], settings["size"], "r+")
    held = settings["held"]
    for block in range(index, _blocks(len(cache)), workers):
        _fill(cache, block, settings["seed"], None if held is None else bool(held))
        yield block


if __name__ == "__main__":
    # One worker of `start_rendering`: FOLDER SETTINGS WORKERS INDEX; says each block that it has drawn. Ctrl-C reaches
    # all processes of a terminal, and the one that asked ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for drawn_block in _drawn_blocks(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])):
        print(drawn_block, flush=True)
