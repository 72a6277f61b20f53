"""What a trace reads of a run: the columns of each head's cross-attention maps, summed over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fpe_kernels import LinearMap

from ...edits.watchers import Image, Watcher, check_same_images
from ...models.roles import BatchRoles
from ...models.sites import Site
from ...models.steps import Step
from ...prompts.encoding import Encoding
from ...prompts.words import TokenizedPrompt, tokenize

__all__ = ["HeadHeat"]


class HeadHeat(Watcher):
    """Sums, head by head and layer by layer, where each token of an image's prompt acts.

    A layer's products carry the tokens' columns along, as many as the prompt has, so that no map is written out.

    Args:
        paths: of the layers that are read.
        tokenizer: the pipeline's.
        single: whether a call may hold one prompt alone.
    """

    def __init__(self, paths: Sequence[str], tokenizer: Any, *, single: bool) -> None:
        self._paths, self._tokenizer, self._single = tuple(paths), tokenizer, single
        self.prompts: tuple[str, ...] = ()
        self._columns: tuple[torch.Tensor, ...] = ()
        self.begin()

    def begin(self) -> None:
        self.sites: dict[str, Site] = {}
        self.images: tuple[Image, ...] | None = None
        #: By image and layer path: [H, tokens, h, w], float32 or wider.
        self.sums: dict[tuple[Image, str], torch.Tensor] = {}
        self.guided = False  # whether calls hold an unconditional half

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(site for site in sites if site.path in self._paths)

    def encoded(self, encoding: Encoding) -> None:
        if encoding.prompts is None:
            self.prompts, self._columns = (), ()
            return
        if self._single and len(encoding.prompts) > 1:
            raise ValueError(
                f'DAAM reads one prompt a call, got {len(encoding.prompts)}: leave compat="original" out to read any '
                "number, and name the image in compute_global_heat_map(image=)"
            )
        known = encoding.placed([tokenize(prompt, self._tokenizer) for prompt in encoding.prompts])
        self.prompts, self._columns = encoding.prompts, tuple(map(_token_columns, known))
        self.begin()

    def columns(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, torch.Tensor]:
        if not self.prompts:
            raise ValueError(
                "the tokens of the prompt are not known, as this pipeline call encodes none: pass prompt= in the place "
                "of prompt_embeds="
            )
        self.images = check_same_images(self.images, roles)
        self.guided = self.guided or bool(roles.select(conditional=False))
        return {row: self._columns[roles.prompt_of(row)] for row in roles.select(conditional=True)}

    def receive(
        self,
        site: Site,
        step: Step,
        roles: BatchRoles,
        columns: Mapping[int, torch.Tensor],
        maps: Mapping[int, LinearMap],
    ) -> None:
        assert site.grid is not None
        self.sites[site.path] = site
        for row, heat in columns.items():  # [H, N, tokens]
            heat = heat.detach().to(torch.promote_types(heat.dtype, torch.float32))
            heat = heat.transpose(1, 2).unflatten(-1, site.grid)
            key = roles.image_of(row), site.path
            # A copy: the columns are a view of the layer's whole output, which they would keep.
            self.sums[key] = self.sums[key] + heat if key in self.sums else heat.clone()


def _token_columns(prompt: TokenizedPrompt) -> torch.Tensor:
    """One column for each token from the start token to the end token: [M, tokens]."""
    columns = torch.zeros(prompt.length, len(prompt.spans), dtype=torch.float64)
    places = range(len(prompt.spans))
    columns[[prompt.first + place for place in places], places] = 1.0
    return columns
