"""What the launches of a forward product are given: its tensors, and the arguments that follow from them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .apply import apply_kernel
from .configs import Config
from .launch import Launch, product_precision, strides
from .packing import Chunk, bias_varies, columns_of, device_table, needs_wide_index, split_width, vector_width
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
    query, key, value, bias, out, logsumexp, row_weight, prior, prior_logsumexp = tensors
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    full_bias = query if bias is None else bias
    table = device_table(chunk.table, query.device)
    return Launch(
        apply_kernel,
        programs=-(-queries // config.block_m) * heads * len(chunk.table),
        config=config,
        tensors={
            "query_ptr": query,
            "key_ptr": key,
            "value_ptr": value,
            "bias_ptr": full_bias,
            "row_weight_ptr": query if row_weight is None else row_weight,
            "out_ptr": out,
            "logsumexp_ptr": logsumexp,
            "table_ptr": table,
            "prior_ptr": query if prior is None else prior,
            "prior_logsumexp_ptr": query if prior_logsumexp is None else prior_logsumexp,
            "lengths_ptr": table if key_lengths is None else device_table((key_lengths,), query.device),
        },
        numbers={
            "scale": scale * LOG2E.value,
            "heads": heads,
            "queries": queries,
            "keys": keys,
            **strides("query", query, "ghnd"),
            **strides("key", key, "ghmd"),
            **strides("value", value, "bhme"),
            **strides("bias", full_bias, "ghnm"),
            **strides("row_weight", query[..., 0] if row_weight is None else row_weight, "bhn"),
            **strides("out", out, "bhne"),
        },
        constants=_constants(tensors, chunk, scale, known, skips, config, key_lengths),
    )


def _constants(
    tensors: ApplyTensors,
    chunk: Chunk,
    scale: float,
    known: bool,
    skips: bool,
    config: Config,
    key_lengths: tuple[int, ...] | None,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    query, key, value, bias, out, _, row_weight, prior, _ = tensors
    _, heads, queries, head_dim = query.shape
    keys, value_dim = key.shape[2], value.shape[3]
    head_pieces, column_pieces = split_width(head_dim), split_width(chunk.branches * value_dim)
    full_bias = query if bias is None else bias
    return {
        "HEAD_DIM": head_dim,
        "HEAD_0": head_pieces[0],
        "HEAD_1": head_pieces[1],
        "VALUE_DIM": value_dim,
        "BRANCHES": chunk.branches,
        "COLUMNS_0": column_pieces[0],
        "COLUMNS_1": column_pieces[1],
        "QUERY_VECTOR": vector_width(query),
        "KEY_VECTOR": vector_width(key),
        "VALUE_VECTOR": vector_width(value),
        "OUT_VECTOR": vector_width(out),
        "KNOWN": known,
        "HAS_BIAS": bias is not None,
        "BIAS_VARIES": bias_varies(full_bias),
        "HAS_WEIGHT": row_weight is not None,
        "SKIPS": row_weight is not None and skips,
        "REPEATS": chunk.repeats,
        "PRESCALE": bias is not None or scale <= 0.0,
        "EVEN_QUERIES": queries % config.block_m == 0,
        "EVEN_KEYS": keys % config.block_n == 0 and key_lengths is None,
        "WIDE": needs_wide_index(
            (query, config.block_m),
            (key, config.block_n),
            (value, config.block_n),
            (out, config.block_m),
            (full_bias, config.block_m),
            (query if row_weight is None else row_weight.unsqueeze(-1), config.block_m),
        ),
        "PRECISION": product_precision(query.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "HAS_LENGTHS": key_lengths is not None,
        "HEADS_PER_KEY": heads // key.shape[1],
        "HEADS_PER_VALUE": heads // value.shape[1],
        "HAS_PRIOR": prior is not None,
    }
