"""What a recorded tensor is of: which row of the source, which part of it, in which module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

__all__ = ["HALVES", "Contents", "Part", "TensorKey", "Tensors"]

#: What the two rows of a source are called.
HALVES = {True: "conditional", False: "unconditional"}


class Part(NamedTuple):
    """A part of the source's conditional or unconditional row.

    Args:
        conditional: of which of the two rows.
        name: "query", "key", "value", "logsumexp" or "feature"; of a tensor also "key_scale", that of integer keys.
    """

    conditional: bool
    name: str

    def __str__(self) -> str:
        return f"{HALVES[self.conditional]} {self.name}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that a text names."""
        half, _, name = text.partition(" ")
        if half not in HALVES.values() or not name:
            raise ValueError(f"expected a part as 'conditional query', got {text!r}")
        return cls(half == HALVES[True], name)


class TensorKey(NamedTuple):
    """Names one tensor of a step.

    Args:
        path: of the module.
        part: that it is.
    """

    path: str
    part: Part

    def __str__(self) -> str:
        return f"{self.path}|{self.part}"

    @classmethod
    def parse(cls, text: str) -> TensorKey:
        """The key that a text names."""
        path, _, part = text.rpartition("|")
        return cls(path, Part.parse(part))


#: For each module's path, its parts with the steps of each: calls of the UNet, of which some schedulers make several a
#: step.
Contents = Mapping[str, Mapping[Part, tuple[int, ...]]]
#: The tensors of a step.
Tensors = dict[TensorKey, torch.Tensor]
