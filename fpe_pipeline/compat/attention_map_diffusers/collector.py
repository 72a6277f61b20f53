"""Maps from the image to the text, kept as what they are made from, by timestep and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fpe_kernels import LinearMap, concatenate

from ...edits.watchers import Watcher
from ...models.roles import BatchRoles
from ...models.sites import Site
from ...models.steps import Step
from ...prompts.encoding import Encoding, encoding_tokenizer
from ..lazy import LazyMap
from ..lazy.storage import Storage

__all__ = ["Maps", "TextMaps"]


class Maps(dict[int | float, dict[str, LazyMap]]):
    """By timestep and layer path, maps [rows, heads, h, w, tokens].

    Attributes:
        tokenizer: whose tokens the first columns are; None where that is not said.
    """

    tokenizer: Any = None


class TextMaps(Watcher):
    """Keeps every layer that attends to text, at every step, in the memory of the host: as queries and keys, or as
    numbers where these are fewer bytes, in layers of many channels and few tokens.

    Args:
        pipe: the pipeline, whose scheduler says the timesteps.
        maps: where they are kept.
        clears: whether a run begins with none.
    """

    def __init__(self, pipe: Any, maps: Maps, *, clears: bool) -> None:
        self._pipe, self._maps, self._clears = pipe, maps, clears

    def begin(self) -> None:
        if self._clears:
            self._maps.clear()

    def encoded(self, encoding: Encoding) -> None:
        # The original labels columns by the tokenizer that it is given, of FLUX.1 too, whose text is T5's.
        first = encoding.texts[0].tokenizer if encoding.texts else encoding_tokenizer(self._pipe)
        self._maps.tokenizer = first if self._clears else None

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(site for site in sites if site.kind == "cross" or (site.kind == "joint" and site.place == "dual"))

    def maps(self, site: Site, step: Step, roles: BatchRoles) -> Sequence[int]:
        # Where the two halves come in two calls, the one that sees the prompts is kept.
        return tuple(range(roles.batch)) if roles.select(conditional=True) else ()

    def receive(
        self,
        site: Site,
        step: Step,
        roles: BatchRoles,
        columns: Mapping[int, torch.Tensor],
        maps: Mapping[int, LinearMap],
    ) -> None:
        if not maps:
            return
        assert site.grid is not None
        dtype = next(iter(maps.values())).dtype
        by_head = Storage(concatenate([_by_head(site, maps[row]) for row in range(roles.batch)]))
        by_head.settle()
        index = torch.arange(by_head.shape[0]).reshape(roles.batch, -1)
        view = LazyMap(by_head.to("cpu"), index, site.grid, (torch.device("cpu"), dtype))
        timestep = self._pipe.scheduler.timesteps[step.call].item()
        self._maps.setdefault(timestep, {})[site.path] = view


def _by_head(site: Site, attention: Any) -> LinearMap:
    """[H, 1, N, M]."""
    return attention if site.kind == "joint" else Storage(attention).rows
