"""Rows of a layer that are not in the batch, because they are known already: of a recorded source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

__all__ = ["Packed", "RecordedLayer", "unpack"]

#: The parts of a row ("query", "key", "value", "feature", …), at the precision that they were kept in.
Packed = dict[str, torch.Tensor]


def unpack(packed: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Packed:
    """The parts of a row in ``dtype``; "logsumexp" keeps its own."""
    parts = {name: t if name == "logsumexp" else t.to(dtype) for name, t in packed.items() if name != "key_scale"}
    if "key_scale" in packed:
        parts["key"] = (packed["key"].float() * packed["key_scale"]).to(dtype)
    return parts


@dataclass(frozen=True)
class RecordedLayer:
    """What a recording holds of one layer at one step.

    Args:
        rows: by the number of the row, its packed parts: "query", "key", "value" [1, H, N | M, D | E] and, where query
            and key make a map, "logsumexp" [1, H, N].
        parts: what there is, in words.
        text_lengths: by the number of the row, its text tokens before padding in joint attention, where that is known.
        origins: where rotary embeddings follow the text's length, what the row's image tokens were turned by in common,
            complex [D / 2]; they are kept without it, and its text tokens as they were.
    """

    rows: Mapping[int, Packed]
    parts: str = ""
    text_lengths: Mapping[int, int] = field(default_factory=dict)
    origins: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def unpacked(self, dtype: torch.dtype) -> dict[str, dict[int, torch.Tensor]]:
        """The tensors in ``dtype``, by part and row."""
        out: dict[str, dict[int, torch.Tensor]] = {"query": {}, "key": {}, "value": {}, "logsumexp": {}}
        for row, packed in self.rows.items():
            for part, tensor in unpack(packed, dtype).items():
                out.setdefault(part, {})[row] = tensor
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
