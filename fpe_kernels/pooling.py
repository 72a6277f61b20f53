"""Averages over blocks of pixels, as a matrix that products of a map can take."""

from __future__ import annotations

import torch
from torch import Tensor

from .validation import Placed


def pooling_matrix(grid: tuple[int, int], size: tuple[int, int], like: Placed) -> Tensor:
    """[tokens, cells]: column c averages the tokens of block c, as ``F.adaptive_avg_pool2d`` does."""
    sides = []
    for tokens, cells in zip(grid, size, strict=True):
        position = torch.arange(tokens, device=like.device).unsqueeze(1)
        cell = torch.arange(cells, device=like.device)
        start, stop = cell * tokens // cells, -(-(cell + 1) * tokens // cells)
        inside = (position >= start) & (position < stop)
        sides.append(inside.to(like.dtype) / (stop - start))
    return torch.kron(*sides)
