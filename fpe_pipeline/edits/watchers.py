"""Watchers: what follows a run inside a session, reads edited attention maps and may change latents between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fpe_kernels import LinearMap

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from ..prompts.encoding import Encoding

__all__ = ["HeatCollector", "Watcher", "blended", "check_one_frame", "check_same_images", "resize_maps"]

Image = tuple[int, int]  # of which prompt, and which of its images


class Watcher:
    """Reads maps of a run as products; the base class reads nothing.

    A session asks it before each UNet call and hands it the answers while the call is under way. Everything that it
    reads is of the *edited* maps.
    """

    #: Whether :meth:`blend` is to be called after every scheduler step.
    blends = False

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The sites that it is asked about. It raises where it needs some and there are none."""
        return ()

    def begin(self) -> None:
        """A new run starts: forget the last one's."""

    def encoded(self, encoding: Encoding) -> None:
        """What the pipeline encodes for the run to come."""

    def columns(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, torch.Tensor]:
        """For some rows, what their map is to be multiplied with [M', C]; computed beside the layer's values.

        In joint attention that is the map of image queries over text keys: [T, C].
        """
        return {}

    def maps(self, site: Site, step: Step, roles: BatchRoles) -> Sequence[int]:
        """Rows whose map is wanted as an operator; of a transformer's joint attention, the columns of its text."""
        return ()

    def observed(self, site: Site, step: Step, roles: BatchRoles) -> Sequence[int]:
        """Rows whose image tokens :meth:`observe` is to be shown, of layers of joint attention."""
        return ()

    def observe(self, site: Site, step: Step, roles: BatchRoles, layer: Any, image: torch.Tensor) -> None:
        """A layer that :meth:`observed` asked for, while it is computed.

        Args:
            site, step, roles: of the layer and its call.
            layer: its projected tokens, after norm and rotary embedding: ``layer.image.key.take(rows)`` and
                ``layer.image.value.take(rows)`` are [rows, H, N, D | E] of the rows' own, and
                ``layer.map(queries, keys)`` makes maps with the layer's scale and backend.
            image: what its image tokens become before they are projected, edited: [B, H, N, E].
        """

    def receive(
        self,
        site: Site,
        step: Step,
        roles: BatchRoles,
        columns: Mapping[int, torch.Tensor],
        maps: Mapping[int, LinearMap],
    ) -> None:
        """What :meth:`columns` [H, N, C] and :meth:`maps` asked for: maps [1, H, N, M].

        Of a transformer's joint attention they are [H, 1, N, T], a head a row: how the image attends to the text, where
        the softmax is over the image's keys too.
        """

    def blend(self, latents: torch.Tensor, step: Step, roles: BatchRoles) -> torch.Tensor:
        """The latents [conditional rows, C, h, w] that the next step starts from."""
        return latents


def blended(
    watchers: Sequence[Watcher], latents: torch.Tensor, step: Step, roles: BatchRoles, channels_last: bool
) -> torch.Tensor:
    """The latents of a step's end that watchers hand on, each from what the one before it made of them."""
    latents = latents.movedim(-1, 1) if channels_last else latents
    for watcher in (watcher for watcher in watchers if watcher.blends):
        latents = watcher.blend(latents, step, roles)
    return latents.movedim(1, -1) if channels_last else latents


class HeatCollector(Watcher):
    """Sums the heat of some tokens over a run: columns of cross-attention maps, or of image queries over text keys in
    joint attention, averaged over heads.

    Args:
        tokens: for each prompt of the batch, groups of token positions, each group one map; () for a prompt that is
            not watched.
        length: tokens after padding.
        selection: chooses the cross-attention sites.
    """

    def __init__(
        self,
        tokens: Sequence[Sequence[Sequence[int]]],
        length: int,
        selection: Callable[[tuple[Site, ...]], tuple[Site, ...]],
    ) -> None:
        self.watch_tokens(tokens, length)
        self._select = selection
        # For each image and grid: the sum over layers and steps [C, h, w], and how many there were.
        self._sums: dict[Image, dict[tuple[int, int], torch.Tensor]] = {}
        self._counts: dict[Image, dict[tuple[int, int], int]] = {}
        self._images: tuple[Image, ...] | None = None

    def watch_tokens(self, tokens: Sequence[Sequence[Sequence[int]]], length: int) -> None:
        """From here on, these tokens; arguments are those of the class."""
        self._columns = [_one_hot(groups, length) if groups else None for groups in tokens]

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return self._select(sites)

    def begin(self) -> None:
        """What a session asks for the length of its ``with`` block."""
        self._sums, self._counts, self._images = {}, {}, None

    def columns(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, torch.Tensor]:
        if not roles.images:  # a call of the unconditional rows alone
            return {}
        self._images = check_same_images(self._images, roles)
        wanted = {}
        for row in roles.select(conditional=True):
            prompt = roles.prompt_of(row)
            if prompt >= len(self._columns):
                raise ValueError(
                    f"words were named for {len(self._columns)} prompts; the batch holds prompt {prompt + 1}: name "
                    "them for every prompt"
                )
            columns = self._columns[prompt]
            if columns is not None:
                wanted[row] = columns
        return wanted

    def receive(
        self,
        site: Site,
        step: Step,
        roles: BatchRoles,
        columns: Mapping[int, torch.Tensor],
        maps: Mapping[int, LinearMap],
    ) -> None:
        assert site.grid is not None
        check_one_frame(site)
        for row, heat in columns.items():
            heat = heat.detach().to(torch.promote_types(heat.dtype, torch.float32)).mean(0)  # [N, C]
            heat = heat.T.reshape(-1, *site.grid)
            image = roles.image_of(row)
            sums, counts = self._sums.setdefault(image, {}), self._counts.setdefault(image, {})
            sums[site.grid] = heat if site.grid not in sums else sums[site.grid] + heat
            counts[site.grid] = counts.get(site.grid, 0) + 1

    def heat(self, image: Image) -> torch.Tensor | None:
        """Mean over layers and steps so far: [C, h, w] on the finest grid; None before the first."""
        if image not in self._sums:
            return None
        sums, count = self._sums[image], sum(self._counts[image].values())
        finest = max(sums, key=lambda grid: grid[0] * grid[1])
        return torch.stack([resize_maps(heat, finest) for heat in sums.values()]).sum(0) / count


def check_one_frame(site: Site) -> None:
    """Raise ValueError for a layer of a video, whose tokens are no picture's."""
    if site.frames > 1:
        raise ValueError(
            f"{site.path} has tokens of {site.frames} frames, and heat is read of one picture: leave out heat maps, "
            "local blends and masks of words in a video, and pass a picture as mask="
        )


def check_same_images(images: tuple[Image, ...] | None, roles: BatchRoles) -> tuple[Image, ...]:
    """The images of a batch, for whom heat is summed; None stands for those of a run that has only begun.

    Rows may come and go with guidance, images may not.

    Raises:
        ValueError: other images than earlier in the run.
    """
    if images not in (None, roles.images):
        raise ValueError(
            f"the batch went from {len(images or ())} to {len(roles.images)} images within a run, so that heat cannot "
            "be told apart: keep all rows to the end (keep_source=True), or read earlier steps"
        )
    return roles.images


def resize_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps [C, h, w] on another grid, bilinearly between the centres of tokens."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return torch.nn.functional.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def _one_hot(groups: Sequence[Sequence[int]], length: int) -> torch.Tensor:
    out = torch.zeros(length, len(groups), dtype=torch.float64)
    for column, tokens in enumerate(groups):
        out[list(tokens), column] = 1.0
    return out
