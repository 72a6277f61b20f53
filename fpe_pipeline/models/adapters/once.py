"""What is read from a tensor's numbers once, and not at each call of a model that gets the same tensor again.

Reading makes the host wait for the device. Places of tokens and masks of padding stay the same objects through a run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["once_a_tensor"]

Made = TypeVar("Made")


def once_a_tensor(make: Callable[[torch.Tensor], Made]) -> Callable[[torch.Tensor], Made]:
    """A function of a tensor's numbers whose answers are kept while the tensor lives and nobody writes to it."""
    kept: Any = WeakTensorKeyDictionary()

    @wraps(make)
    def read(tensor: torch.Tensor) -> Made:
        if tensor.is_inference():  # of which nobody counts the changes
            return make(tensor)
        found = kept.get(tensor)
        if found is None or found[0] != tensor._version:
            found = kept[tensor] = tensor._version, make(tensor)
        made: Made = found[1]
        return made

    return read
