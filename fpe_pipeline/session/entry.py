"""What a session refuses on entry, before a layer is touched."""

from __future__ import annotations

from typing import Any

import fpe_kernels

from ..edits import Edit
from ..edits.base import begun, feature_modules_of, parts_of, prompts_of, watchers_of
from ..edits.watchers import HeatCollector
from ..models.adapters.adapter import ModelAdapter
from ..models.precision import check_precision
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..prompts.encoding import Encoding

__all__ = ["check_backend", "check_entry", "check_selects", "check_words", "unread"]


def check_entry(
    adapter: ModelAdapter, edit: Any, backend: str, noise: Any, roles: BatchRoles | None, layout: tuple[Any, ...]
) -> None:
    """Refuse the arguments of a session that cannot be served.

    Args:
        adapter: of the session's model.
        edit, backend, noise, roles: as `EditingSession` takes them.
        layout: its other arguments that describe the batch, None where they were left out.

    Raises:
        TypeError: no edit.
        ValueError: videos and panoramas, words of a model in whose text none is looked for, a model
            in float8, an unknown backend or noise, two layouts, or one that the pipeline's calls do not have.
        RuntimeError: a backend that cannot run here.
    """
    if not isinstance(edit, Edit):
        raise TypeError(f"expected an Edit, such as FreePromptEdit(), got {type(edit).__name__}")
    adapter.check()
    check_words(adapter, edit)
    for name, model in adapter.models.items():
        check_precision(name or adapter.word.lower(), model)
    if roles is not None and any(given is not None for given in layout):
        raise ValueError("roles= is the whole layout: leave out images_per_prompt, source_of and guidance")
    if adapter.guides_apart and adapter.pipe is not None and layout[2]:
        raise ValueError(
            f"{type(adapter.pipe).__name__} guides by calls of their own, each of one half of the rows, which are told "
            "apart by themselves: leave out classifier_free_guidance, or describe another layout with roles="
        )
    if noise not in (None, "shared", "separate"):
        raise ValueError(f'expected noise to be "shared" or "separate", got {noise!r}')
    check_backend(backend)


def check_words(adapter: ModelAdapter, edit: Edit) -> None:
    """Raise ValueError for an edit that looks for words in a model among whose text tokens none is looked for."""
    if not adapter.words_refused:
        return
    running = begun(edit)
    reads = any(isinstance(watcher, HeatCollector) for watcher in watchers_of(running))  # masks of words
    if reads or any(prompts_of(part) for part in parts_of(running)):
        raise ValueError(adapter.words_refused)


def check_selects(edit: Edit, sites: tuple[Site, ...]) -> None:
    """Raise ValueError for an edit, alone or in a combination, that selects nothing, watches nothing and injects
    nothing, unless it means to."""
    for part in parts_of(begun(edit)):
        if part.select(sites) or part.windows() == () or watchers_of(part) or feature_modules_of(part):
            continue
        raise ValueError(
            f"{type(part).__name__} selects none of the model's {len(sites)} attention layers, so that it would edit "
            "nothing: return some of the sites from select, or use no session"
        )


def unread(edit: Edit) -> Encoding:
    """What a pipeline encodes that is called with embeddings and encodes nothing.

    Raises:
        ValueError: an edit that is written for prompts.
    """
    if any(prompts_of(part) for part in parts_of(edit)):
        raise ValueError(
            "the pipeline got embeddings, in which no words are looked for: pass prompts, or use an edit that looks "
            "for none, such as FreePromptEdit, ConsistEdit or MasaCtrlEdit"
        )
    return Encoding()


def check_backend(backend: str) -> None:
    """Raise ValueError for a backend that is not known, RuntimeError for one that cannot run here."""
    if backend == "auto":
        return
    known = fpe_kernels.backends()
    if backend not in known:
        raise ValueError(f'unknown backend {backend!r}: expected "auto" or one of {sorted(known)}')
    if known[backend] != "available":
        raise RuntimeError(f"backend {backend!r} cannot run here: {known[backend]}")
