"""What every map has, and small dense views of it: some rows, some columns, averages over blocks of pixels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import indices, validation
from .given import given
from .pooling import pooling_matrix
from .precision import at_given_dtype

DENSE_LIMIT_BYTES = 1 << 30


class Operator(ABC):
    """A linear operator [B, H, N, M] from key tokens to query tokens."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """(B, H, N, M)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of every product and of its operand."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where products are computed."""


class MapViews(Operator):
    """Views of an operator that is known by its products."""

    @abstractmethod
    def matmul(self, value: Any) -> Any:
        """``A @ value``."""

    @property
    @abstractmethod
    def T(self) -> Any:
        """The adjoint."""

    def column_sums(self) -> Tensor:
        """[B, H, M]: how much attention each key receives, summed over the query rows; equals ``A.T @ 1``."""
        sums: Tensor = self.T.matmul(self._ones(self.shape[2], 1)).squeeze(-1)
        return given(sums)

    def _ones(self, tokens: int, columns: int) -> Tensor:
        return torch.ones((*self.shape[:2], tokens, columns), dtype=self.dtype, device=self.device)

    def rows(self, index: int | Sequence[int] | Tensor) -> Tensor:
        """The rows of the query tokens ``index``: [B, H, len(index), M]. Memory grows with len(index) · M only."""
        return given(self.rows_at(indices.check_token_index(index, self.shape[2], self.device)))

    def rows_at(self, index: Tensor) -> Tensor:
        """:meth:`rows` of positions on the device, as they are: to look at them would be to wait for it."""
        rows: Tensor = self.T.matmul(self._unit_columns(index, self.shape[2])).transpose(-1, -2)
        return rows

    def columns(self, index: int | Sequence[int] | Tensor) -> Tensor:
        """The columns of the key tokens ``index``: [B, H, N, len(index)]. Memory grows with N · len(index) only."""
        return given(self.columns_at(indices.check_token_index(index, self.shape[3], self.device)))

    def columns_at(self, index: Tensor) -> Tensor:
        """:meth:`columns` of positions on the device, as they are."""
        columns: Tensor = self.matmul(self._unit_columns(index, self.shape[3]))
        return columns

    def _unit_columns(self, index: Tensor, tokens: int) -> Tensor:
        position = torch.arange(tokens, device=self.device).unsqueeze(1)
        return (position == index).to(self.dtype).expand(*self.shape[:2], -1, -1)

    def pooled(self, query_grid: tuple[int, int], key_grid: tuple[int, int], size: int | tuple[int, int]) -> Tensor:
        """A small dense view to look at: entries averaged over blocks of query pixels and of key pixels.

        Args:
            query_grid: (height, width) of the query tokens, row by row; their product is N.
            key_grid: (height, width) of the key tokens; their product is M.
            size: (height, width) of the block grid, or one int for both; at most either grid.

        Returns:
            [B, H, size_h · size_w, size_h · size_w]; blocks as ``F.adaptive_avg_pool2d`` cuts them.
        """
        size = indices.check_block_grid(size)
        pool_query = indices.check_pooling("query_grid", query_grid, self.shape[2], size)
        pool_key = indices.check_pooling("key_grid", key_grid, self.shape[3], size)
        dtype = validation.accumulator_dtype(self.dtype)
        by_key = self.matmul(pooling_matrix(pool_key, size, self).expand(*self.shape[:2], -1, -1))
        blocks = pooling_matrix(pool_query, size, self).to(dtype)
        with at_given_dtype(self.device):
            pooled: Tensor = (blocks.transpose(-1, -2) @ by_key.to(dtype)).to(self.dtype)
        return pooled

    def dense(self, *, max_bytes: int = DENSE_LIMIT_BYTES) -> Tensor:
        """The whole map [B, H, N, M], for small maps and for checks.

        Raises:
            ValueError: if the map would take more than ``max_bytes`` (default 1 GiB).
        """
        needed = math.prod(self.shape) * self.dtype.itemsize
        if needed > max_bytes:
            raise ValueError(
                f"a dense map {tuple(self.shape)} takes {needed:,} bytes, more than max_bytes={max_bytes:,}. Use "
                "products, A.rows, A.columns or A.pooled, or pass a larger max_bytes."
            )
        return self._entries()

    def _entries(self) -> Tensor:
        return self.columns_at(torch.arange(self.shape[3], device=self.device))
