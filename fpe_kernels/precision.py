"""Which digits a map is computed with: those of its tensors, whatever surrounds the call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def at_given_dtype(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast: products of float32 operands are float32, in plain PyTorch products too."""
    # On the meta device nothing is computed, and autocast cannot be asked there.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
