"""What the launches of a gradient are given: its tensors, and the arguments that follow from them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .backward import gradient_kernel
from .configs import Config
from .launch import Launch, product_precision, strides
from .packing import Chunk, bias_varies, columns_of, device_table, needs_wide_index, split_width, vector_width


class GradientTensors(NamedTuple):
    """What the launches of one of the two gradients read and write.

    Args:
        own, other: [G, H, T, D] and [G, H, S, D]; query and key, or key and query. Heads of keys may be fewer.
        own_factor, other_factor: [B, H, T, E] and [B, H, S, E].
        bias: [G, H, T, S], or None.
        gradient: [G, H, T, D], with a head for each query head.
        logsumexp, delta: [G, H, N], contiguous.
    """

    own: Tensor
    other: Tensor
    own_factor: Tensor
    other_factor: Tensor
    bias: Tensor | None
    gradient: Tensor
    logsumexp: Tensor
    delta: Tensor

    def of(self, chunk: Chunk) -> GradientTensors:
        """Narrowed to the columns of a chunk."""
        own_factor, other_factor = columns_of(self.own_factor, chunk), columns_of(self.other_factor, chunk)
        return self._replace(own_factor=own_factor, other_factor=other_factor)


def prepare(
    tensors: GradientTensors,
    chunk: Chunk,
    scale: float,
    own_statistics: bool,
    config: Config,
    key_lengths: tuple[int, ...] | None = None,
) -> Launch:
    """The launch of one chunk, of tensors that are narrowed to its columns."""
    own, other, own_factor, other_factor, bias, gradient, logsumexp, delta = tensors
    _, heads, owns, head_dim = gradient.shape
    others, value_dim = other.shape[2], own_factor.shape[3]
    head_pieces, column_pieces = split_width(head_dim), split_width(chunk.branches * value_dim)
    full_bias = own if bias is None else bias
    table, whole = device_table(chunk.table, own.device), key_lengths is None
    return Launch(
        gradient_kernel,
        programs=-(-owns // config.block_m) * heads * len(chunk.table),
        config=config,
        tensors={
            "own_ptr": own,
            "other_ptr": other,
            "own_factor_ptr": own_factor,
            "other_factor_ptr": other_factor,
            "bias_ptr": full_bias,
            "gradient_ptr": gradient,
            "logsumexp_ptr": logsumexp,
            "delta_ptr": delta,
            "table_ptr": table,
            "lengths_ptr": table if key_lengths is None else device_table((key_lengths,), own.device),
        },
        numbers={
            "scale": scale,
            "heads": heads,
            "owns": owns,
            "others": others,
            **strides("own", own, "ghtd"),
            **strides("other", other, "ghsd"),
            **strides("own_factor", own_factor, "bhte"),
            **strides("other_factor", other_factor, "bhse"),
            **strides("bias", full_bias, "ghts"),
            **strides("gradient", gradient, "ghtd"),
        },
        constants={
            "HEAD_DIM": head_dim,
            "HEAD_0": head_pieces[0],
            "HEAD_1": head_pieces[1],
            "VALUE_DIM": value_dim,
            "BRANCHES": chunk.branches,
            "COLUMNS_0": column_pieces[0],
            "COLUMNS_1": column_pieces[1],
            "OWN_VECTOR": vector_width(own),
            "OTHER_VECTOR": vector_width(other),
            "OWN_FACTOR_VECTOR": vector_width(own_factor),
            "OTHER_FACTOR_VECTOR": vector_width(other_factor),
            "OWN_STATISTICS": own_statistics,
            "FIRST": chunk.first,
            "HAS_BIAS": bias is not None,
            "BIAS_VARIES": bias_varies(full_bias),
            "EVEN_OWNS": owns % config.block_m == 0 and (whole or own_statistics),
            "EVEN_OTHERS": others % config.block_n == 0 and (whole or not own_statistics),
            "WIDE": needs_wide_index(
                (own, config.block_m),
                (other, config.block_n),
                (own_factor, config.block_m),
                (other_factor, config.block_n),
                (full_bias, max(config.block_m, config.block_n)),
                (gradient, config.block_m),
            ),
            "PRECISION": product_precision(own.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "HAS_LENGTHS": key_lengths is not None,
            "HEADS_PER_OWN": heads // own.shape[1],
            "HEADS_PER_OTHER": heads // other.shape[1],
            "HEADS_PER_OWN_FACTOR": heads // own_factor.shape[1],
            "HEADS_PER_OTHER_FACTOR": heads // other_factor.shape[1],
        },
    )
