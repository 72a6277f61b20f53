"""What the launches of a gradient are given: its tensors, and the arguments that follow from them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .backward import gradient_kernel
from .configs import Config
from .launch import Launch, product_precision
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
    own, other, own_factor, other_factor, bias, gradient, _, _ = tensors
    (_, heads, owns, head_dim), others = gradient.shape, other.shape[2]
    whole, longer = key_lengths is None, max(config.block_m, config.block_n)
    of_own, of_other = (own, own_factor, gradient), (other, other_factor)
    return Launch(
        gradient_kernel,
        programs=-(-owns // config.block_m) * heads * len(chunk.table),
        config=config,
        tensors={
            **{f"{name}_ptr": tensor for name, tensor in tensors._asdict().items()},
            "table_ptr": device_table(chunk.table, own.device),
            "lengths_ptr": device_lengths(key_lengths, own.device),
        },
        numbers={
            "scale": scale,
            "heads": heads,
            "tokens": (owns, others),
            "own_strides": own.stride(),
            "other_strides": other.stride(),
            "own_factor_strides": own_factor.stride(),
            "other_factor_strides": other_factor.stride(),
            "bias_strides": None if bias is None else bias.stride(),
            "gradient_strides": gradient.stride(),
        },
        constants={
            "HEAD": widths(head_dim),
            "COLUMNS": widths(chunk.branches * own_factor.shape[3]),
            "BRANCHES": chunk.branches,
            "VECTORS": tuple(map(vector_width, (own, other, own_factor, other_factor))),
            "SHARING": tuple(heads // tensor.shape[1] for tensor in (own, other, own_factor, other_factor)),
            "BLOCK": (config.block_m, config.block_n),
            "EVEN": (
                owns % config.block_m == 0 and (whole or own_statistics),
                others % config.block_n == 0 and (whole or not own_statistics),
            ),
            "OWN_STATISTICS": own_statistics,
            "FIRST": chunk.first,
            "BIAS_VARIES": bias_varies(bias),
            "WIDE": needs_wide_index(config.block_m, *of_own)
            or needs_wide_index(config.block_n, *of_other)
            or needs_wide_index(longer, bias),
            "PRECISION": "ieee" if config.exact else product_precision(own.dtype),
        },
    )
