"""What the launches of a forward product are given: its tensors, and the arguments that follow from them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .apply import apply_kernel
from .configs import Config
from .launch import Launch, folds, product_precision
from .packing import (
    Chunk,
    bias_varies,
    columns_of,
    device_lengths,
    device_table,
    needs_wide_index,
    vector_width,
    widths,
)
from .primitives import LOG2E


class ApplyTensors(NamedTuple):
    """What the launches of a forward product read and write.

    Args:
        query, key: [G, H, N, D] and [G, h, M, D].
        value: [B, h, M, E].
        bias: [G, H, N, M], or None.
        out: [B, H, N, E].
        logsumexp: [G, H, N], contiguous.
        row_weight: [B, H, N], or None.
        prior: with the shape and strides of ``out``, or None.
        prior_logsumexp: [B, H, N], contiguous, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    out: Tensor
    logsumexp: Tensor
    row_weight: Tensor | None = None
    prior: Tensor | None = None
    prior_logsumexp: Tensor | None = None

    def expanded(self) -> ApplyTensors:
        """With bias and row weights for every score and every row."""
        (maps, heads, queries, _), keys = self.query.shape, self.key.shape[2]
        bias = None if self.bias is None else self.bias.expand(maps, heads, queries, keys)
        return self._replace(
            bias=bias, row_weight=None if self.row_weight is None else self.row_weight.expand(self.out.shape[:3])
        )

    def of(self, chunk: Chunk) -> ApplyTensors:
        """Narrowed to the columns of a chunk."""
        prior = None if self.prior is None else columns_of(self.prior, chunk)
        return self._replace(value=columns_of(self.value, chunk), out=columns_of(self.out, chunk), prior=prior)


def prepare(
    tensors: ApplyTensors,
    chunk: Chunk,
    scale: float,
    known: bool,
    skips: bool,
    config: Config,
    key_lengths: tuple[int, ...] | None = None,
) -> Launch:
    """The launch of one chunk, of expanded tensors that are narrowed to its columns.

    ``skips`` says that nothing else needs the statistics of rows whose weights are zero.
    """
    query, key, value, bias, out, _, row_weight, _, _ = tensors
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    of_queries, of_keys = (query, out, bias, row_weight), (key, value)
    return Launch(
        apply_kernel,
        programs=-(-queries // config.block_m) * heads * len(chunk.table),
        config=config,
        tensors={
            **{f"{name}_ptr": tensor for name, tensor in tensors._asdict().items()},
            "table_ptr": device_table(chunk.table, query.device),
            "lengths_ptr": device_lengths(key_lengths, query.device),
        },
        numbers={
            "scale": scale * LOG2E.value,
            "heads": heads,
            "tokens": (queries, keys),
            "query_strides": query.stride(),
            "key_strides": key.stride(),
            "value_strides": value.stride(),
            "bias_strides": None if bias is None else bias.stride(),
            "out_strides": out.stride(),
            "row_weight_strides": None if row_weight is None else row_weight.stride(),
        },
        constants={
            "HEAD": widths(query.shape[3]),
            "COLUMNS": widths(chunk.branches * value.shape[3]),
            "BRANCHES": chunk.branches,
            "VECTORS": tuple(map(vector_width, (query, key, value, out))),
            "SHARING": (heads // key.shape[1], heads // value.shape[1]),
            "BLOCK": (config.block_m, config.block_n),
            "EVEN": (queries % config.block_m == 0, keys % config.block_n == 0 and key_lengths is None),
            "KNOWN": known,
            "BIAS_VARIES": bias_varies(bias),
            "SKIPS": row_weight is not None and skips,
            "REPEATS": chunk.repeats,
            "PRESCALE": bias is not None or not folds(scale),
            "WIDE": needs_wide_index(config.block_m, *of_queries) or needs_wide_index(config.block_n, *of_keys),
            "PRECISION": product_precision(query.dtype),
        },
    )
