"""What a map gives to whoever asks: tensors that may be changed in place."""

from __future__ import annotations

import torch
from torch import Tensor


def given(result: Tensor) -> Tensor:
    """``result``, which nobody else holds.

    One that was made without gradients may be a view, and such a view autograd lets nobody change in place once
    gradients are enabled; detached, it is a tensor of its own over the same memory.
    """
    return result if torch.is_grad_enabled() else result.detach()
