"""The models of a server: one in memory at a time, one run at a time.

A run that stands still holds a twin of the pipeline, with its edit in the layers, and no lock: others use the model
meanwhile. Where another model is to be loaded, runs that stand still end, for two do not fit everywhere.
"""

from __future__ import annotations

import gc
import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from ..embedded.scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS
from ..errors import InputError
from ..models.adapters.families import adapter_of
from ..models.loading import identity, pick_device, pick_dtype
from ..models.served_families import FAMILIES, Family, family_of
from ..models.sources import EMBEDDED, find_model, is_embedded
from ..models.twins import twin
from ..runs.loading import load_pipeline
from ..runs.making import Loaded
from ..runs.repeatable import arithmetic, repeatable, set_arithmetic, threads_for
from .estimates import ModelPace
from .watched import Watched

__all__ = ["Models", "choices_of", "vocabulary"]

logger = logging.getLogger(__name__)


#: Seconds between two looks of a run that goes on at whether it was ended meanwhile.
_TURN = 0.05
#: Seconds that a question about a model's pace waits for whoever uses it.
_MOMENT = 2.0


@dataclass
class _Hold:
    """Whether the lock is to be released by the run that took it."""

    is_mine: bool = True


@dataclass(eq=False)
class _Standing:
    """A run that stands still: what ends it, its thread, and whether it was ended to make room."""

    end: Callable[[], None]
    thread: threading.Thread
    is_ended: bool = False


@dataclass
class Models:
    """What a server may load, by name; the one that is loaded, and the lock of its runs.

    Args:
        names: as ``fpe edit --model`` takes them; the first is the page's choice.
        device, dtype, backend: of every run.
    """

    names: Sequence[str] = (EMBEDDED,)
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _loaded: tuple[str, Loaded] | None = field(default=None, init=False, repr=False)
    _standing: list[_Standing] = field(default_factory=list, init=False, repr=False)
    _paces: dict[str, ModelPace | None] = field(default_factory=dict, init=False, repr=False)
    _by_place: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _layers: dict[str, list[tuple[str, str]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._by_place = {find_model(name).location: name for name in self.names}  # which raises InputError for none
        self.device = pick_device(self.device)
        pick_dtype(self.dtype, self.device)

    @property
    def machine(self) -> dict[str, Any]:
        """What the server decides of every visitor's settings."""
        return {"device": self.device, "dtype": self.dtype, "backend": self.backend}

    @contextmanager
    def use(self, name: str, watched: Watched | None = None) -> Iterator[Loaded]:
        """A loaded model for the time of a block; others wait. After an error no memory of the run is kept.

        Args:
            name: of the model.
            watched: of the run, which may stop in the block; it is given a twin of the model, and others use the model
                while it stands still.

        Raises:
            InputError: none of the server's models.
        """
        name = self.check(name)
        self._lock.acquire()
        hold = _Hold()
        try:
            loaded = self._load(name)
            if watched is not None:
                outside = arithmetic()
                watched.aside = lambda end: self._aside(end, hold, outside)
                loaded = replace(loaded, pipe=twin(loaded.pipe))
            yield loaded
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # whose variables are the run's tensors
            _free(self.device)
            raise
        finally:
            if watched is not None:
                watched.aside = lambda end: nullcontext()
            if hold.is_mine:
                self._lock.release()

    @contextmanager
    def _aside(self, end: Callable[[], None], hold: _Hold, outside: Any) -> Iterator[None]:
        """Others use the models in this block, in a run that holds them; it may be ended from there."""
        inside = arithmetic()
        set_arithmetic(outside)
        standing = _Standing(end, threading.current_thread())
        self._standing.append(standing)
        self._lock.release()
        try:
            yield
        finally:
            while not (standing.is_ended or self._lock.acquire(timeout=_TURN)):
                pass
            if standing.is_ended:
                hold.is_mine = False  # who ended it holds the lock, and waits for this thread
            else:
                self._standing.remove(standing)
            set_arithmetic(inside)

    def check(self, name: str) -> str:
        """The server's name of a model; raises InputError unless it has one.

        Args:
            name: it, or the folder or file that it stands for, by which a record calls a model.
        """
        name = name if name in self.names else self._by_place.get(name, name)
        if name not in self.names:
            raise InputError(f"this page has the models {', '.join(self.names)}, not {name!r}")
        return name

    def identity(self, name: str) -> str | None:
        """The identity of a model where it is the one in memory; None where it is not."""
        kept = self._loaded
        return kept[1].identity if kept is not None and kept[0] == name else None

    def family(self, name: str) -> Family:
        """The kind of a model; of one that only loading tells, a UNet until it was loaded."""
        kept = self._loaded
        if kept is not None and kept[0] == name:
            return family_of(kept[1].pipe)
        return find_model(name).family or "unet"

    def layers(self, name: str) -> list[str]:
        """The layers that edits of a model can be chosen by; it is loaded where it never was."""
        if name not in self._layers:
            with self.use(name):
                pass
        return [layer for _, layer in self._layers[name]]

    def pace(self, name: str, wait: float = _MOMENT) -> ModelPace | None:
        """How fast a model is that was loaded before; None of others.

        It is found with the first question after the model was loaded, not while somebody waits for a picture.

        Args:
            wait: seconds until whoever uses the models is done with them; after these it is not known yet.
        """
        if name not in self._paces and self._is_loaded(name) and self._lock.acquire(timeout=wait):
            try:
                if name not in self._paces and self._loaded is not None and self._is_loaded(name):
                    self._paces[name] = self._tried_out(name, self._loaded[1].pipe)
            finally:
                self._lock.release()
        return self._paces.get(name)

    def _is_loaded(self, name: str) -> bool:
        return self._loaded is not None and self._loaded[0] == name

    def _load(self, name: str) -> Loaded:
        if self._loaded is not None and self._is_loaded(name):
            return self._loaded[1]
        self._loaded = None  # before the next: two do not fit everywhere
        for standing in self._standing:
            standing.is_ended = True
            standing.end()
            standing.thread.join()
        self._standing.clear()
        _free(self.device)
        source = find_model(name)
        pipe = load_pipeline(source, dtype=pick_dtype(self.dtype, self.device, source), device=self.device)
        self._loaded = (name, Loaded(pipe, identity(pipe)))
        self._layers[name] = choices_of(pipe)
        return self._loaded[1]

    def _tried_out(self, name: str, pipe: Any) -> ModelPace | None:
        """A model's pace; one that is called otherwise than Stable Diffusion has none, and is served so."""
        try:
            with repeatable(threads_for(name, self.device)):
                return ModelPace(pipe)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            logger.warning("the page cannot say beforehand what runs of %s take: %s", name, error)
            return None


def choices_of(pipe: Any) -> list[tuple[str, str]]:
    """The layers that a model's edits can be chosen by, as (label, name): a UNet's levels, then blocks."""
    height, width = (side // pipe.vae_scale_factor for side in pipe.native_size)
    sites = [site.at(height, width) for site in adapter_of(pipe).sites]
    if not FAMILIES[family_of(pipe)].is_unet:
        sites = [site for site in sites if site.kind != "cross"]
        paths = dict.fromkeys(site.path.rpartition(".")[0] for site in sites)
        return [(path.replace("_blocks.", " "), path) for path in paths]
    sites = [site for site in sites if site.kind == "self"]
    levels = {site.level: site.grid for site in sites}
    blocks: dict[str, int] = {}
    for site in sites:
        block = site.path.partition(".attentions")[0]
        blocks[block] = blocks.get(block, 0) + 1
    return [
        *((f"level {level} · {grid[0]}×{grid[1]}", f"level {level}") for level, grid in sorted(levels.items()) if grid),
        *((f"{block} · {count}", block) for block, count in blocks.items()),
    ]


def vocabulary(model: str) -> dict[str, tuple[str, ...]]:
    """The words that the embedded model draws, by kind; {} for others, which draw nearly anything."""
    if not is_embedded(model):
        return {}
    return {"colour": tuple(COLOURS), "object": tuple(OBJECTS), "place": tuple(BACKGROUNDS)}


def _free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
