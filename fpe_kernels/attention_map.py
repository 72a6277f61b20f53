"""``AttentionMap``: softmax(scale · Q Kᵀ + bias) as a linear operator that is never stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import (
    dispatch,
    indices,
    ops,  # noqa: F401  registers torch.ops.fpe_kernels
    ready,
    validation,
)
from .composition import LinearMap
from .kept import KeptLogsumexp, usable
from .normal_form import gathered_rows
from .precision import at_given_dtype
from .softmax_map import SoftmaxMap

# Whether a graph is made of the code itself; what only records operators has tensors or modes of its own.
_compiling = torch.compiler.is_dynamo_compiling


class AttentionMap(SoftmaxMap, LinearMap):
    """The attention map of ``query`` and ``key`` as an operator: known by its products, never stored.

    Equivalent PyTorch, with every map dense::

        A = torch.softmax(scale * query @ key.transpose(-1, -2) + bias, dim=-1)    # [B, H, N, M]
        A @ value;  A.transpose(-1, -2) @ weight;  A.sum(-2)

    Query rows that ``bias`` masks throughout (all ``-inf``) are zero. Products are differentiable in query, key, bias
    and the operand, and deterministic: the same call gives the same bits on the same machine with as many threads. A
    row computed in another batch, by other threads or on another CPU is the same to rounding. The first product leaves
    the log-sum-exp of the rows for the next, which is the same to rounding too; after a change of query, key or bias in
    place it is computed again. Changes that PyTorch does not count are not seen: of tensors made in inference mode,
    through ``.data`` or NumPy, and by optimizers with ``fused=True``; nor is what changes inside one compiled function.
    Make a new map there.

    Args:
        query: [B, H, N, D], float16, bfloat16, float32 or float64, any strides.
        key: [B, h, M, D], dtype and device of ``query``, any strides. h is H, or a divisor of it: query head i then
            reads key head i // (H / h), as with ``enable_gqa`` of ``F.scaled_dot_product_attention``, and so for
            values, which have h or H heads. M may be 0: every product is zero and the log-sum-exp is ``-inf``.
        scale: factor of the scores; None means ``D ** -0.5``.
        bias: added to the scaled scores (natural-log units), broadcastable to [B, H, N, M], dtype of ``query``. Masking
            out is ``-inf``, and a row of ``-inf`` throughout is zero. A finite mask such as ``finfo.min`` works beside
            entries that are not masked; a row that holds nothing else is not treated as masked, and since its scores
            have no digits left, what it gives is not defined.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``; see :func:`fpe_kernels.backends`.
        logsumexp: [B, H, N], float32 (float64 beside float64 inputs): the row-wise log-sum-exp of the scores where
            it is known, as from a recorded map. It must belong to this query, key, scale, bias and key_lengths.
        key_lengths: B ints in [0, M]: keys from that position on are padding and do not exist, without a bias. It
            decides what is computed, so it lives on the host. None means M for every row.

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
        key_lengths: Sequence[int] | None = None,
    ) -> None:
        self.query, self.key = validation.check_query_key(query, key)
        self.bias = validation.check_bias(bias, query, key)
        self.key_lengths = indices.check_key_lengths(key_lengths, key)
        self.scale = validation.check_scale(scale, query.shape[-1])
        self.backend = dispatch.check_name(backend)
        self._serving = dispatch.select(backend, query)
        self._given = None if logsumexp is None else validation.check_logsumexp(logsumexp, query).detach()
        self._kept: KeptLogsumexp | None = None
        self._traced = torch.compiler.is_compiling()

    @property
    def shape(self) -> torch.Size:
        """(B, H, N, M)."""
        return torch.Size((*self.query.shape[:3], self.key.shape[2]))

    @property
    def key_heads(self) -> int:
        """Heads of the keys: h."""
        return self.key.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of query and key, and of every product."""
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        """Device of query and key."""
        return self.query.device

    @property
    def requires_grad(self) -> bool:
        """Whether query, key or bias takes part in gradients."""
        return any(part is not None and part.requires_grad for part in self._parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements that define the map: query, key, bias and, once computed, the log-sum-exp."""
        parts = (*self._parts, self._known())
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def __repr__(self) -> str:
        return (
            f"AttentionMap(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', "
            f"backend={self.backend!r}, scale={self.scale:.6g}, nbytes={self.nbytes})"
        )

    def gathered_product(self, value: Tensor, index: tuple[int, ...], weight: Tensor | None) -> Tensor:
        """``weight ⊙ (A[index] @ value)`` for value [len(index), H, M, E]: what combinations are computed with."""
        known = self._known()
        if known is not None:
            return self._replay(value, known, index, weight)
        # Rows that no value named, or whose weight is zero, have no statistics yet.
        return self._apply(value, index, weight, keep=weight is None)[0]

    def gathered_with_logsumexp(self, value: Tensor, index: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """``A[index] @ value`` and the log-sum-exp [len(index) | 1, H, N], both in the dtype of the statistics."""
        known = None if torch.is_grad_enabled() and self.requires_grad else self._known()
        if known is not None:
            return self._replay(value, known, index, wide=True), gathered_rows(known, index)
        out, logsumexp = self._apply(value, index, wide=True)
        return out, gathered_rows(logsumexp, index)

    def gathered_merge(
        self, value: Tensor, index: tuple[int, ...], weight: Tensor | None, prior: Tensor, prior_logsumexp: Tensor
    ) -> Tensor:
        """``weight ⊙`` the product over these keys and others, normalised together; without gradients.

        ``prior`` [len(index), H, N, E], wide, is the product over the other keys, and ``prior_logsumexp`` that of them.
        """
        operands = (self.query, self.key, value, self.bias, self._known(), list(index), self.scale, self._serving)
        out: Tensor = torch.ops.fpe_kernels.merge(*operands, prior, prior_logsumexp, weight, self.key_lengths)
        return out

    def _replay(
        self,
        value: Tensor,
        known: Tensor,
        index: tuple[int, ...],
        weight: Tensor | None = None,
        wide: bool = False,
    ) -> Tensor:
        settings = (list(index), self.scale, self._serving, weight, self.key_lengths, wide)
        out: Tensor = torch.ops.fpe_kernels.replay(self.query, self.key, value, self.bias, known, *settings)
        return out

    def _apply(
        self,
        value: Tensor,
        index: tuple[int, ...],
        weight: Tensor | None = None,
        wide: bool = False,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor]:
        settings = (list(index), self.scale, self._serving, weight, self.key_lengths, wide)
        out, logsumexp = torch.ops.fpe_kernels.apply(self.query, self.key, value, self.bias, *settings)
        if keep and len(set(index)) == self.shape[0]:
            # The numbers are kept, not their graph: a later product must not run, or need, an earlier one's backward.
            self._keep(logsumexp.detach())
        return out, logsumexp

    def gathered_adjoint(self, weight: Tensor, index: tuple[int, ...]) -> Tensor:
        """``A[index].T @ weight`` for weight [len(index), H, N, E]."""
        operands = (self.query, self.key, weight, self.bias, self._statistics())
        out: Tensor = torch.ops.fpe_kernels.adjoint(*operands, list(index), self.scale, self._serving, self.key_lengths)
        return out

    @property
    def logsumexp(self) -> Tensor:
        """[B, H, N], float32 (float64 beside float64): log Σ_m exp(scores), natural log; computed once and kept.

        Where a gradient of query, key or bias is recorded, each access computes it again, with a graph of its own.
        """
        if torch.is_grad_enabled() and self.requires_grad:
            return self._apply(self._no_value(), tuple(range(self.shape[0])), keep=False)[1]
        return self._statistics()

    def _statistics(self) -> Tensor:
        """The kept log-sum-exp: numbers without a graph, for products whose gradient is whole without one."""
        known = self._known()
        if known is None:
            with torch.no_grad():
                _, known = self._apply(self._no_value(), tuple(range(self.shape[0])))
        return known

    def _no_value(self) -> Tensor:
        return self.key.new_empty((*self.key.shape[:3], 0))

    @property
    def _settings(self) -> tuple[float, tuple[int, ...] | None]:
        return self.scale, self.key_lengths

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.query, self.key, self.bias

    def _known(self) -> Tensor | None:
        """The log-sum-exp that was given or, while it holds, the one that an earlier product left."""
        if self._given is not None:
            return usable(self._given)
        return None if self._kept is None or self._out_of_reach() else self._kept.of(self._parts, self._settings)

    def _keep(self, logsumexp: Tensor) -> None:
        self._kept = None if self._out_of_reach() else KeptLogsumexp(logsumexp, self._parts, self._settings)

    def _out_of_reach(self) -> bool:
        # A compiled function cannot ask whether tensors from outside were changed between its calls.
        return torch.compiler.is_compiling() and not self._traced

    def queries(self, start: int, stop: int | None = None) -> AttentionMap:
        """The map of the query tokens ``start`` to ``stop``, a view: its products cost as much as it has rows."""
        start, stop = indices.check_range("query tokens", start, stop, self.shape[2])
        bias = self.bias if self.bias is None or self.bias.shape[2] == 1 else self.bias[:, :, start:stop]
        part = self._of(self.query[:, :, start:stop], self.key, bias, self.key_lengths)
        part._take_over(self, lambda known: known[:, :, start:stop])
        return part

    def keys(self, start: int, stop: int | None = None) -> AttentionMap:
        """The softmax over the key tokens ``start`` to ``stop`` alone, a view; for its entries in A, :meth:`block`.

        ``join([A.keys(0, n), A.keys(n)])`` is A.
        """
        start, stop = indices.check_range("key tokens", start, stop, self.shape[3], empty=True)
        bias = self.bias if self.bias is None or self.bias.shape[3] == 1 else self.bias[..., start:stop]
        lengths = None
        if self.key_lengths is not None:
            lengths = tuple(max(0, min(length, stop) - start) for length in self.key_lengths)
        return self._of(self.query, self.key[:, :, start:stop], bias, lengths)

    def _of(self, query: Tensor, key: Tensor, bias: Tensor | None, lengths: Sequence[int] | None) -> AttentionMap:
        """A map of other tensors, with the settings of this one."""
        return AttentionMap(query, key, scale=self.scale, bias=bias, backend=self.backend, key_lengths=lengths)

    def wide_rows(self, index: Tensor) -> Tensor:
        """:meth:`rows` in the dtype of the statistics; ``index`` holds positions on the device."""
        bias = self.bias if self.bias is None or self.bias.shape[2] == 1 else self.bias[:, :, index]
        return self._probabilities(self.query[:, :, index], self.key, bias, self.logsumexp[:, :, index])

    def wide_columns(self, index: Tensor) -> Tensor:
        """:meth:`columns` in the dtype of the statistics; ``index`` holds positions on the device."""
        bias = self.bias if self.bias is None or self.bias.shape[3] == 1 else self.bias[..., index]
        return self._probabilities(self.query, self.key[:, :, index], bias, self.logsumexp, index)

    def _entries(self) -> Tensor:
        return self._probabilities(self.query, self.key, self.bias, self.logsumexp).to(self.dtype)

    def _probabilities(
        self, query: Tensor, key: Tensor, bias: Tensor | None, logsumexp: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """[B, H, n, m], the keys at ``positions`` or all of them."""
        dtype, heads = validation.accumulator_dtype(self.dtype), query.shape[1]
        exists = None
        if self.key_lengths is not None:
            # By fills: a copy from the host would not go into a CUDA graph.
            lengths = torch.cat([torch.full((1, 1, 1, 1), length, device=self.device) for length in self.key_lengths])
            exists = (torch.arange(key.shape[2], device=self.device) if positions is None else positions) < lengths
            # Whatever padding holds: zero times it is a number in the gradients too.
            key = torch.where(exists.transpose(-1, -2), key, 0.0)
        if self.key_heads != heads:
            key = key.repeat_interleave(heads // self.key_heads, dim=1)
        with at_given_dtype(self.device):
            scores = self.scale * (query.to(dtype) @ key.to(dtype).transpose(-1, -2))
        if bias is not None:
            scores = scores + bias
        if exists is not None:
            scores = torch.where(exists, scores, float("-inf"))
        finite = torch.where(logsumexp.isneginf(), 0.0, logsumexp)
        return torch.exp(scores - finite.unsqueeze(-1))

    def __getitem__(self, index: int | slice | Sequence[int]) -> AttentionMap:
        """The map of some batch rows; an int keeps the batch axis, with one row."""
        chosen = indices.check_batch_rows(index, self.shape[0])
        lengths = self.key_lengths
        if lengths is not None:
            lengths = lengths[chosen] if isinstance(chosen, slice) else tuple(lengths[row] for row in chosen)
        return self._with(lambda tensor: tensor if tensor.shape[0] == 1 < self.shape[0] else tensor[chosen], lengths)

    def to(self, *args: Any, **kwargs: Any) -> AttentionMap:
        """Move or convert query, key and bias as ``Tensor.to`` does; a dtype change drops the log-sum-exp."""
        moved = self._changed(lambda tensor: tensor.to(*args, **kwargs), self.key_lengths)
        if moved.dtype == self.dtype:
            moved._take_over(self, lambda known: known.to(moved.device))
        return moved

    def detach(self) -> AttentionMap:
        """The same map without a gradient history."""
        return self._with(torch.Tensor.detach, self.key_lengths)

    def _with(self, change: Callable[[Tensor], Tensor], lengths: Sequence[int] | None) -> AttentionMap:
        changed = self._changed(change, lengths)
        changed._take_over(self, change)
        return changed

    def _changed(self, change: Callable[[Tensor], Tensor], lengths: Sequence[int] | None) -> AttentionMap:
        return self._of(change(self.query), change(self.key), None if self.bias is None else change(self.bias), lengths)

    def _take_over(self, other: AttentionMap, change: Callable[[Tensor], Tensor]) -> None:
        """Know what ``other`` knows of its statistics, after ``change``."""
        known = other._known()
        if other._given is not None:
            self._given = change(other._given)
        elif known is not None:
            self._keep(change(known))


def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    map_index: Sequence[int],
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    weight: float | Sequence[float] | Tensor | None = None,
    backend: str = "auto",
    key_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Attention in which batch rows share maps: each distinct map is computed once, for all rows that name it.

    Equivalent PyTorch, which computes (or stores) a map for every row::

        out = F.scaled_dot_product_attention(
            query[map_index], key[map_index], value, attn_mask=bias[map_index], scale=scale
        )
        weight.unsqueeze(-1) * out

    Free-Prompt-Editing of one source and two targets is ``map_index=[0, 0, 0]``; beside an unconditional half of three
    rows that keep their own maps, ``[0, 1, 2, 3, 3, 3]`` with G = 4.

    Args:
        query: [G, H, N, D], the queries of the G distinct maps; float16, bfloat16, float32 or float64, any strides.
        key: [G, h, M, D]; h is H or a divisor of it, as in :class:`AttentionMap`.
        value: [B, H, M, E] or [B, h, M, E]; E need not be D.
        map_index: B ints in [0, G): the map of each batch row. It decides what is launched, so it lives on the host.
        scale: factor of the scores; None means ``D ** -0.5``.
        bias: added to the scaled scores, broadcastable to [G, H, N, M], dtype of ``query``. Masking out is ``-inf``, as
            in :class:`AttentionMap`; rows of ``finfo.min`` throughout are not treated as masked.
        weight: of each output row, for blends of maps: a number, a list of B numbers, or a tensor that broadcasts to
            [B, H, N], dtype of ``query`` or float32 (float64 beside float64); None means 1. Query rows whose weights
            are zero in every batch row that shares the map cost nothing: the kernels read no key for a tile of them,
            the ``torch`` backend on a CPU leaves out each of them.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.
        key_lengths: G ints in [0, M]: keys from that position on do not exist, as in :class:`AttentionMap`.

    Returns:
        [B, H, N, E], in memory [B, N, H, E], so that merging heads is a view.

    Raises:
        TypeError, ValueError: for ranks, shapes, dtypes and devices that do not fit, or a backend that cannot serve.
        IndexError: for an entry of ``map_index`` outside [0, G).

    Source: Liu et al., Towards Understanding Cross and Self-Attention in Stable Diffusion for Text-Guided Image
    Editing, CVPR 2024: the target's self-attention map is replaced by the source's.
    """
    given = query, key, value, map_index, scale, backend
    repeatable = bias is None and weight is None and key_lengths is None and not _compiling()
    if repeatable and (done := ready.call(*given)) is not None:
        return done
    query, key = validation.check_query_key(query, key, batch="G")
    index = indices.check_map_index(map_index, query.shape[0])
    shape = (len(index), *query.shape[1:3], key.shape[2])
    value = validation.check_value(value, query, shape, key.shape[1])
    lengths = indices.check_key_lengths(key_lengths, key)
    bias = validation.check_bias(bias, query, key)
    scale = validation.check_scale(scale, query.shape[-1])
    if weight is not None:
        weight = validation.check_row_weight(weight, query, shape)
    serving = dispatch.select(backend, query)
    out: Tensor = torch.ops.fpe_kernels.apply(query, key, value, bias, list(index), scale, serving, weight, lengths)[0]
    if repeatable and (preparing := dispatch.load_ready(serving)) is not None:
        ready.keep(*given, scale, out, preparing.ready_call)
    return out
