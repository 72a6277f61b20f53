"""Seeded tensors in the memory layouts that attention processors make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]


def generator(seed: int) -> torch.Generator:
    """A CPU generator: the same seed gives the same numbers whatever device the tensors move to."""
    return torch.Generator().manual_seed(seed)


def _contiguous(shape: Shape, rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng)


def _heads_split(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, heads, tokens, dim = shape
    return torch.randn(batch, tokens, heads * dim, generator=rng).view(batch, tokens, heads, dim).transpose(1, 2)


def _fused_chunk(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, heads, tokens, dim = shape
    chunk = torch.randn(batch, tokens, 3 * heads * dim, generator=rng).chunk(3, dim=-1)[1]
    tensor: Tensor = chunk.unflatten(-1, (heads, dim)).transpose(1, 2)
    return tensor


def _fused_heads(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, heads, tokens, dim = shape
    return torch.randn(batch, tokens, heads, 3 * dim, generator=rng)[..., dim : 2 * dim].transpose(1, 2)


def _batch_expanded(shape: Shape, rng: torch.Generator) -> Tensor:
    return torch.randn(1, *shape[1:], generator=rng).expand(shape)


def _heads_expanded(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, _, tokens, dim = shape
    return torch.randn(batch, 1, tokens, dim, generator=rng).expand(shape)


def _batch_sliced(shape: Shape, rng: torch.Generator) -> Tensor:
    return _heads_split((2 * shape[0] + 1, *shape[1:]), rng)[1::2]


def _tokens_sliced(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, heads, tokens, dim = shape
    return _heads_split((batch, heads, 2 * tokens + 1, dim), rng)[:, :, 1::2]


def _entries_sliced(shape: Shape, rng: torch.Generator) -> Tensor:
    return torch.randn(*shape[:3], 2 * shape[3], generator=rng)[..., ::2]


def _channels_first(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, heads, tokens, dim = shape
    return torch.randn(batch, heads, dim, tokens, generator=rng).transpose(2, 3)


def _misaligned(shape: Shape, rng: torch.Generator) -> Tensor:
    batch, heads, tokens, dim = shape
    return torch.randn(batch * heads * tokens * dim + 1, generator=rng)[1:].view(shape)


LAYOUTS: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "contiguous": _contiguous,
    "heads_split": _heads_split,  # a projection, view and transpose
    "fused_chunk": _fused_chunk,  # one third of a fused qkv projection, q | k | v
    "fused_heads": _fused_heads,  # the same with q | k | v inside every head
    "batch_expanded": _batch_expanded,
    "heads_expanded": _heads_expanded,
    "batch_sliced": _batch_sliced,  # every second row of a batch
    "tokens_sliced": _tokens_sliced,
    "entries_sliced": _entries_sliced,  # neighbours are two elements apart
    "channels_first": _channels_first,  # a 1 × 1 convolution as projection
    "misaligned": _misaligned,  # starts one element past an aligned address
}


def make(
    shape: Sequence[int],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "contiguous",
    amplitude: float = 1.0,
) -> Tensor:
    """A seeded normal tensor [B, H, L, D] with the strides of ``layout``, a key of :data:`LAYOUTS`.

    Equivalent PyTorch, up to strides::

        amplitude * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    """
    batch, heads, tokens, dim = shape
    tensor = LAYOUTS[layout]((batch, heads, tokens, dim), generator(seed))
    # Through the whole storage, so that conversion and movement keep strides, overlaps and the offset.
    storage = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    moved = (storage * amplitude).to(device=device, dtype=dtype)
    return moved.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
