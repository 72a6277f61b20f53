"""At which precision a row's tensors are recorded.

A map is kept as query, key and log-sum-exp. At reduced precision the log-sum-exp is that of the *rounded* query and
key, so that every row of the replayed map still sums to one.

=============  ======================================================  ================================
precision      kept                                                    bytes of a map's token and head
=============  ======================================================  ================================
"exact"        everything as it is                                     2 · D · itemsize + 4
"half"         everything in float16                                   4 · D + 4
"int8-keys"    keys in int8 with a scale for each token, the rest in   3 · D + 4 + 4
               float16
=============  ======================================================  ================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch

from ..session.layers.known_rows import Packed

__all__ = [
    "HALF_LIMIT",
    "PRECISIONS",
    "Precision",
    "half_reach",
    "pack",
    "packed_bytes",
]

Precision = Literal["exact", "half", "int8-keys"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
HALF_LIMIT = torch.finfo(torch.float16).max


def pack(parts: Mapping[str, torch.Tensor], precision: Precision) -> Packed:
    """Parts of a row ("query", "key", "value", "feature", …) as they are kept; integer keys bring "key_scale"."""
    if precision == "exact":
        return dict(parts)
    packed = {name: tensor.half() for name, tensor in parts.items()}
    if precision == "int8-keys" and "key" in parts:
        key = parts["key"].float()
        scale = (key.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        packed["key"] = (key / scale).round().to(torch.int8)
        packed["key_scale"] = scale
    return packed


def half_reach(parts: Mapping[str, torch.Tensor], precision: Precision) -> torch.Tensor | None:
    """The largest magnitude among what :func:`pack` puts into float16, which ends at 65504; None where nothing is."""
    halved = [
        tensor for name, tensor in parts.items() if precision != "exact" and (name, precision) != ("key", "int8-keys")
    ]
    return torch.stack([tensor.abs().amax().float() for tensor in halved]).amax() if halved else None


def packed_bytes(part: str, tokens: int, width: int, itemsize: int, precision: Precision) -> int:
    """Bytes of a part with ``tokens`` vectors of ``width`` numbers; ``itemsize`` is that of the model's dtype."""
    if part == "logsumexp":
        return tokens * (8 if itemsize == 8 else 4)
    if precision == "int8-keys" and part == "key":
        return tokens * (width + 4)
    return tokens * width * (itemsize if precision == "exact" else 2)
