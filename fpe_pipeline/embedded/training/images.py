"""Rendered pictures where training reads them: on its device, from the moment that they are drawn."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from .data import Rendering

__all__ = ["Images", "picture_tensor"]

_CHUNK = 2048


class Images:
    """Pictures of a rendering in a device's memory, as many as are drawn by now.

    Args:
        rendering: where they come from.
        device: where they go. On a CPU they stay where they are.
        growing: whether more are taken over as they are drawn; otherwise all of them are waited for at once.

    Args:
        pixels: uint8 ``[n, 3, h, w]``.
        masks: uint8 ``[n, h, w]``.
        labels: int64 ``[n, 3]``, indices of object, colour and background.
        size: pixels a side.
    """

    def __init__(self, rendering: Rendering, device: torch.device | str, *, growing: bool = False) -> None:
        self._rendering, self._device = rendering, torch.device(device)
        cache = rendering.cache
        self.size, self.count = int(cache.images.shape[1]), 0
        if self._device.type == "cpu":
            self._images, self._masks = picture_tensor(cache.images), picture_tensor(cache.masks)
        else:
            self._images = torch.empty(cache.images.shape, dtype=torch.uint8, device=device)
            self._masks = torch.empty(cache.masks.shape, dtype=torch.uint8, device=device)
        if not growing:
            rendering.wait()
        self.refresh()

    def refresh(self) -> int:
        """Take over what was drawn since; returns how many there are."""
        ready = self._rendering.ready
        if self._device.type != "cpu":
            cache = self._rendering.cache
            for start in range(self.count, ready, _CHUNK):
                part = slice(start, min(start + _CHUNK, ready))
                self._images[part].copy_(picture_tensor(cache.images[part]))
                self._masks[part].copy_(picture_tensor(cache.masks[part]))
        self.count = ready
        return ready

    @property
    def pixels(self) -> torch.Tensor:
        return self._images[: self.count].permute(0, 3, 1, 2)

    @property
    def masks(self) -> torch.Tensor:
        return self._masks[: self.count]

    @property
    def labels(self) -> torch.Tensor:
        return torch.from_numpy(self._rendering.cache.first(self.count).labels).to(self._device)

    def crops(self, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
        """Parts of pictures at random: uint8 ``[count, 3, size, size]``."""
        device = generator.device
        rows = torch.randint(self.count, (count,), generator=generator, device=device)
        corners = torch.randint(self.size - size + 1, (2, count, 1), generator=generator, device=device)
        y, x = corners + torch.arange(size, device=device)  # [count, size] each
        return self._images[rows[:, None, None], y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def picture_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over an array's memory, which a finished cache maps read-only: nothing here writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(array))
