"""At which precision a row's tensors are recorded, and a layer's recorded rows ready for use.

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
from dataclasses import dataclass
from typing import Literal, get_args

import torch

__all__ = [
    "HALF_LIMIT",
    "PRECISIONS",
    "Packed",
    "Precision",
    "RecordedLayer",
    "half_reach",
    "pack",
    "packed_bytes",
    "unpack",
]

Precision = Literal["exact", "half", "int8-keys"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Packed = dict[str, torch.Tensor]
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


def unpack(packed: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Packed:
    """The parts of :func:`pack` in ``dtype``; "logsumexp" keeps its own."""
    parts = {name: t if name == "logsumexp" else t.to(dtype) for name, t in packed.items() if name != "key_scale"}
    if "key_scale" in packed:
        parts["key"] = (packed["key"].float() * packed["key_scale"]).to(dtype)
    return parts


def packed_bytes(part: str, tokens: int, width: int, itemsize: int, precision: Precision) -> int:
    """Bytes of a part with ``tokens`` vectors of ``width`` numbers; ``itemsize`` is that of the model's dtype."""
    if part == "logsumexp":
        return tokens * (8 if itemsize == 8 else 4)
    if precision == "int8-keys" and part == "key":
        return tokens * (width + 4)
    return tokens * width * (itemsize if precision == "exact" else 2)


@dataclass(frozen=True)
class RecordedLayer:
    """What a recording holds of one layer at one step.

    Args:
        rows: by the number of the row, its packed parts: "query", "key", "value" [1, H, N | M, D | E] and, where query
            and key make a map, "logsumexp" [1, H, N].
        parts: what there is, in words.
    """

    rows: Mapping[int, Packed]
    parts: str = ""

    def unpacked(self, dtype: torch.dtype) -> dict[str, dict[int, torch.Tensor]]:
        """The tensors in ``dtype``, by part and row."""
        out: dict[str, dict[int, torch.Tensor]] = {"query": {}, "key": {}, "value": {}, "logsumexp": {}}
        for row, packed in self.rows.items():
            for part, tensor in unpack(packed, dtype).items():
                out[part][row] = tensor
        return out

    @property
    def nbytes(self) -> int:
        """Bytes that were read."""
        return sum(tensor.nbytes for packed in self.rows.values() for tensor in packed.values())

    def maps_nbytes(self, itemsize: int) -> int:
        """Bytes that its maps would take if they were stored, at so many bytes a number."""
        return sum(
            packed["logsumexp"].numel() * packed["key"].shape[-2] * itemsize
            for packed in self.rows.values()
            if "logsumexp" in packed
        )
