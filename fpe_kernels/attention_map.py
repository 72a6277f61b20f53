"""``AttentionMap``: softmax(scale · Q Kᵀ + bias) as a linear operator that is never stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from . import dispatch, ops, validation

DENSE_LIMIT_BYTES = 1 << 30


class AttentionMap:
    """The attention map of ``query`` and ``key`` as an operator: known by its products, never stored.

    Equivalent PyTorch, with every map dense::

        A = torch.softmax(scale * query @ key.transpose(-1, -2) + bias, dim=-1)    # [B, H, N, M]
        A @ value;  A.transpose(-1, -2) @ weight;  A.sum(-2)

    Query rows that ``bias`` masks throughout (all ``-inf``) are zero. Products are differentiable in query, key, bias
    and the operand, and deterministic: the same inputs give the same bits.

    Args:
        query: [B, H, N, D], float16, bfloat16, float32 or float64, any strides.
        key: [B, H, M, D], dtype and device of ``query``, any strides.
        scale: factor of the scores; None means ``D ** -0.5``.
        bias: added to the scaled scores (natural-log units), broadcastable to [B, H, N, M], dtype of ``query``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``; see :func:`fpe_kernels.backends`.
        logsumexp: [B, H, N], float32 (float64 beside float64 inputs): the row-wise log-sum-exp of the scores where
            it is known, as from a recorded map. It must belong to this query, key, scale and bias.

    Raises:
        TypeError, ValueError: for ranks, shapes, dtypes and devices that do not fit, and for a named backend that
            cannot serve these tensors, with the reason.

    >>> A = AttentionMap(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8))
    >>> (A @ torch.ones(1, 2, 7, 3)).allclose(torch.ones(1, 2, 5, 3))
    True
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None = None,
        bias: Tensor | None = None,
        backend: str = "auto",
        logsumexp: Tensor | None = None,
    ) -> None:
        self.query, self.key = validation.check_query_key(query, key)
        self.bias = validation.check_bias(bias, query, key)
        self.scale = validation.check_scale(scale, query.shape[-1])
        self.backend = dispatch.check_name(backend)
        self._serving = dispatch.select(backend, query)
        self._logsumexp = None if logsumexp is None else validation.check_logsumexp(logsumexp, query).detach()

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """(B, H, N, M)."""
        return torch.Size((*self.query.shape[:3], self.key.shape[2]))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of query and key, and of every product."""
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        """Device of query and key."""
        return self.query.device

    @property
    def nbytes(self) -> int:
        """Bytes of the elements that define the map: query, key, bias and, once computed, the log-sum-exp."""
        parts = (self.query, self.key, self.bias, self._logsumexp)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def __repr__(self) -> str:
        return (
            f"AttentionMap(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', "
            f"backend={self.backend!r}, scale={self.scale:.6g}, nbytes={self.nbytes})"
        )

    # -- products -----------------------------------------------------------------------------------------------------

    @overload
    def __matmul__(self, value: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, value: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]: ...
    def __matmul__(self, value: Any) -> Any:
        """``A @ value``: [B, H, M, E] -> [B, H, N, E]. A tuple gives a tuple, from one pass over the scores."""
        if isinstance(value, (tuple, list)):
            if not value:
                raise ValueError("A @ () has no value to multiply with; pass at least one [B, H, M, E].")
            parts = [validation.check_value(part, self.query, self.key, self.shape[0]) for part in value]
            return torch.split(self._product(torch.cat(parts, dim=-1)), [part.shape[-1] for part in parts], dim=-1)
        return self._product(validation.check_value(value, self.query, self.key, self.shape[0]))

    def matmul(self, value: Any) -> Any:
        """``A @ value`` as a call: ``torch.compile`` traces methods, not ``@`` of classes that it does not know."""
        return self.__matmul__(value)

    def _product(self, value: Tensor) -> Tensor:
        operands = (self.query, self.key, value, self.bias)
        rest = (list(range(self.shape[0])), self.scale, self._serving)
        if self._logsumexp is not None:
            return torch.ops.fpe_kernels.replay(*operands, self._logsumexp, *rest)
        out, logsumexp = torch.ops.fpe_kernels.apply(*operands, *rest)
        # The numbers are kept, not their graph: a later product must not run, or need, an earlier one's backward.
        self._logsumexp = logsumexp.detach()
        return out

    @property
    def logsumexp(self) -> Tensor:
        """[B, H, N], float32 (float64 beside float64): log Σ_m exp(scores), natural log; computed once and kept.

        Where a gradient of query, key or bias is recorded, each access computes it again, with a graph of its own.
        """
        parts = (self.query, self.key, self.bias)
        if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts):
            nothing = self.key.new_empty((*self.key.shape[:3], 0))
            index = list(range(self.shape[0]))
            return torch.ops.fpe_kernels.apply(
                self.query, self.key, nothing, self.bias, index, self.scale, self._serving
            )[1]
        return self._statistics()

    def _statistics(self) -> Tensor:
        """The kept log-sum-exp: numbers without a graph, for products whose gradient is whole without one."""
        if self._logsumexp is None:
            with torch.no_grad():
                self._product(self.key.new_empty((*self.key.shape[:3], 0)))
        assert self._logsumexp is not None
        return self._logsumexp

    @property
    def T(self) -> TransposedAttentionMap:
        """The adjoint: ``A.T @ weight``, [B, H, N, E] -> [B, H, M, E]."""
        return TransposedAttentionMap(self)

    def column_sums(self) -> Tensor:
        """[B, H, M]: how much attention each key receives, summed over the query rows; equals ``A.T @ 1``."""
        return self.T.matmul(self.query.new_ones((*self.query.shape[:3], 1))).squeeze(-1)

    # -- views of a few entries ---------------------------------------------------------------------------------------

    def rows(self, index: int | Sequence[int] | Tensor) -> Tensor:
        """The rows of the query tokens ``index``: [B, H, len(index), M]. Memory grows with len(index) · M only."""
        index = validation.check_token_index(index, self.shape[2], self.device)
        bias = None
        if self.bias is not None:
            bias = self.bias if self.bias.shape[2] == 1 else self.bias[:, :, index]
        return self._entries(self.query[:, :, index], self.key, bias, self.logsumexp[:, :, index])

    def columns(self, index: int | Sequence[int] | Tensor) -> Tensor:
        """The columns of the key tokens ``index``: [B, H, N, len(index)]. Memory grows with N · len(index) only."""
        index = validation.check_token_index(index, self.shape[3], self.device)
        bias = None
        if self.bias is not None:
            bias = self.bias if self.bias.shape[3] == 1 else self.bias[..., index]
        return self._entries(self.query, self.key[:, :, index], bias, self.logsumexp)

    def _entries(self, query: Tensor, key: Tensor, bias: Tensor | None, logsumexp: Tensor) -> Tensor:
        dtype = ops.accumulator_dtype(self.dtype)
        scores = self.scale * (query.to(dtype) @ key.to(dtype).transpose(-1, -2))
        if bias is not None:
            scores = scores + bias
        finite = torch.where(logsumexp.isneginf(), 0.0, logsumexp)
        return torch.exp(scores - finite.unsqueeze(-1)).to(self.dtype)

    def pooled(self, query_grid: tuple[int, int], key_grid: tuple[int, int], size: int | tuple[int, int]) -> Tensor:
        """A small dense view to look at: entries averaged over blocks of query pixels and of key pixels.

        Args:
            query_grid: (height, width) of the query tokens, row by row; their product is N.
            key_grid: (height, width) of the key tokens; their product is M.
            size: (height, width) of the block grid, or one int for both; at most either grid.

        Returns:
            [B, H, size_h · size_w, size_h · size_w]; blocks as ``F.adaptive_avg_pool2d`` cuts them.
        """
        size = (size, size) if isinstance(size, int) else size
        pool_query = validation.check_pooling("query_grid", query_grid, self.shape[2], size)
        pool_key = validation.check_pooling("key_grid", key_grid, self.shape[3], size)
        dtype = ops.accumulator_dtype(self.dtype)
        by_key = self.matmul(_pooling_matrix(pool_key, size, self.query).expand(*self.shape[:2], -1, -1))
        blocks = _pooling_matrix(pool_query, size, self.query).to(dtype)
        return (blocks.transpose(-1, -2) @ by_key.to(dtype)).to(self.dtype)

    def dense(self, *, max_bytes: int = DENSE_LIMIT_BYTES) -> Tensor:
        """The whole map [B, H, N, M], for small maps and for checks.

        Raises:
            ValueError: if the map would take more than ``max_bytes`` (default 1 GiB).
        """
        needed = self.shape.numel() * self.query.element_size()
        if needed > max_bytes:
            raise ValueError(
                f"a dense map {tuple(self.shape)} takes {needed:,} bytes, more than max_bytes={max_bytes:,}. Use "
                "products, A.rows, A.columns or A.pooled, or pass a larger max_bytes."
            )
        return self._entries(self.query, self.key, self.bias, self.logsumexp)

    # -- batch views and movement -------------------------------------------------------------------------------------

    def __getitem__(self, index: int | slice | Sequence[int]) -> AttentionMap:
        """The map of some batch rows; an int keeps the batch axis, with one row."""
        if isinstance(index, int):
            if not -self.shape[0] <= index < self.shape[0]:
                raise IndexError(f"batch index {index} is out of range for {self.shape[0]} row(s).")
            index = slice(index % self.shape[0], index % self.shape[0] + 1)
        elif not isinstance(index, (slice, list, tuple)):
            raise TypeError(f"A[i] takes an int, a slice or a list of ints over the batch, got {type(index).__name__}.")
        index = list(index) if isinstance(index, tuple) else index
        return self._with(lambda tensor: tensor if tensor.shape[0] == 1 < self.shape[0] else tensor[index])

    def to(self, *args: Any, **kwargs: Any) -> AttentionMap:
        """Move or convert query, key and bias as ``Tensor.to`` does; a dtype change drops the log-sum-exp."""
        moved = self._with(lambda tensor: tensor.to(*args, **kwargs), keep_logsumexp=False)
        if self._logsumexp is not None and moved.dtype == self.dtype:
            moved._logsumexp = self._logsumexp.to(moved.device)
        return moved

    def detach(self) -> AttentionMap:
        """The same map without a gradient history."""
        return self._with(torch.Tensor.detach)

    def _with(self, change: Any, keep_logsumexp: bool = True) -> AttentionMap:
        known = self._logsumexp if keep_logsumexp else None
        return AttentionMap(
            change(self.query),
            change(self.key),
            scale=self.scale,
            bias=None if self.bias is None else change(self.bias),
            backend=self.backend,
            logsumexp=None if known is None else change(known),
        )


class TransposedAttentionMap:
    """The adjoint of an :class:`AttentionMap`; ``A.T`` makes it."""

    def __init__(self, attention_map: AttentionMap) -> None:
        self.T = attention_map

    @property
    def shape(self) -> torch.Size:
        """(B, H, M, N)."""
        batch, heads, queries, keys = self.T.shape
        return torch.Size((batch, heads, keys, queries))

    def __repr__(self) -> str:
        return f"{self.T!r}.T"

    def matmul(self, weight: Tensor) -> Tensor:
        """``A.T @ weight`` as a call, which ``torch.compile`` traces."""
        return self.__matmul__(weight)

    def __matmul__(self, weight: Tensor) -> Tensor:
        """``A.T @ weight``: [B, H, N, E] -> [B, H, M, E]."""
        owner = self.T
        weight = validation.check_weight(weight, owner.query)
        return torch.ops.fpe_kernels.adjoint(
            owner.query,
            owner.key,
            weight,
            owner.bias,
            owner._statistics(),
            list(range(owner.shape[0])),
            owner.scale,
            owner._serving,
        )


def _pooling_matrix(grid: tuple[int, int], size: tuple[int, int], like: Tensor) -> Tensor:
    """[tokens, cells]: column c averages the tokens of block c, as ``F.adaptive_avg_pool2d`` does."""
    sides = []
    for tokens, cells in zip(grid, size, strict=True):
        position = torch.arange(tokens, device=like.device).unsqueeze(1)
        cell = torch.arange(cells, device=like.device)
        start, stop = cell * tokens // cells, -(-(cell + 1) * tokens // cells)
        inside = (position >= start) & (position < stop)
        sides.append(inside.to(like.dtype) / (stop - start))
    return torch.kron(*sides)


def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    map_index: Sequence[int],
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention in which batch rows share maps: each distinct map is computed once, for all rows that name it.

    Equivalent PyTorch, which computes (or stores) a map for every row::

        F.scaled_dot_product_attention(query[map_index], key[map_index], value, attn_mask=bias[map_index], scale=scale)

    Free-Prompt-Editing of one source and two targets is ``map_index=[0, 0, 0]``; beside an unconditional half of three
    rows that keep their own maps, ``[0, 1, 2, 3, 3, 3]`` with G = 4.

    Args:
        query: [G, H, N, D], the queries of the G distinct maps; float16, bfloat16, float32 or float64, any strides.
        key: [G, H, M, D].
        value: [B, H, M, E]; E need not be D.
        map_index: B ints in [0, G): the map of each batch row. It decides what is launched, so it lives on the host.
        scale: factor of the scores; None means ``D ** -0.5``.
        bias: added to the scaled scores, broadcastable to [G, H, N, M], dtype of ``query``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        [B, H, N, E], in memory [B, N, H, E], so that merging heads is a view.

    Raises:
        TypeError, ValueError: for ranks, shapes, dtypes and devices that do not fit, or a backend that cannot serve.
        IndexError: for an entry of ``map_index`` outside [0, G).

    Source: Liu et al., Towards Understanding Cross and Self-Attention in Stable Diffusion for Text-Guided Image
    Editing, CVPR 2024: the target's self-attention map is replaced by the source's.
    """
    query, key = validation.check_query_key(query, key, batch="G")
    index = validation.check_map_index(map_index, query.shape[0])
    value = validation.check_value(value, query, key, batch=len(index))
    bias = validation.check_bias(bias, query, key)
    scale = validation.check_scale(scale, query.shape[-1])
    out, _ = torch.ops.fpe_kernels.apply(query, key, value, bias, list(index), scale, dispatch.select(backend, query))
    return out
