"""``init_pipeline`` and ``attn_maps``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from ...heatmaps.watching import watching
from ...models.adapters.adapter import identity
from ...models.adapters.families import adapter_of
from ..sessions import leave
from ..switch import chosen_compat
from .collector import Maps, TextMaps

__all__ = ["attn_maps", "init_pipeline", "restore_pipeline", "watched_pipeline"]

#: By timestep and then by layer path, the maps of the latest call of a pipeline that was initialised:
#: [rows, heads, h, w, tokens], lazy (`LazyMap`), on the CPU. Rows are those of the batch, its unconditional half first.
attn_maps: Maps = Maps()

_WATCHED: WeakKeyDictionary[Any, AbstractContextManager[Any]] = WeakKeyDictionary()


def init_pipeline(pipeline: Any, *, compat: str | None = None) -> Any:
    """Keep the maps from image to text of every call of a pipeline from here on, in `attn_maps`.

    Args:
        pipeline: of diffusers, with a UNet, or of Stable Diffusion 3 or FLUX.1.
        compat: "original" never forgets an earlier call's maps, as the original does: those of another number of steps
            stay among the new ones.

    Returns:
        The pipeline. `restore_pipeline` leaves it as it was found. One that was initialised before begins anew.

    Raises:
        TypeError: a pipeline without a model that is known.
    """
    compat = chosen_compat(compat)
    key = identity(adapter_of(pipeline).module)
    if key in _WATCHED:
        leave(_WATCHED.pop(key))
    watched = watching(pipeline, TextMaps(pipeline, attn_maps, clears=compat is None))
    watched.__enter__()
    _WATCHED[key] = watched
    return pipeline


def restore_pipeline(pipeline: Any) -> Any:
    """Leave a pipeline as it was before `init_pipeline`; `attn_maps` keeps what it holds.

    Raises:
        RuntimeError: it was not initialised.
    """
    watched = _WATCHED.pop(identity(adapter_of(pipeline).module), None)
    if watched is None:
        raise RuntimeError("this pipeline was not initialised, or was restored already")
    watched.__exit__(None, None, None)
    return pipeline


@contextmanager
def watched_pipeline(pipeline: Any, *, compat: str | None = None) -> Iterator[Any]:
    """`init_pipeline` for the length of a ``with`` block."""
    init_pipeline(pipeline, compat=compat)
    try:
        yield pipeline
    finally:
        restore_pipeline(pipeline)
