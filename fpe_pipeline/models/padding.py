"""How much of each text is no padding, of masks that pipelines give their transformers."""

from __future__ import annotations

import torch

from .once import once_a_tensor

__all__ = ["text_lengths"]


@once_a_tensor
def text_lengths(mask: torch.Tensor) -> tuple[int, ...] | None:
    """Text tokens of each row before its padding, of a mask [rows, tokens] that is 0 there; None where there is none.

    Raises:
        ValueError: tokens that are left out and followed by others.
    """
    if bool(mask.bool().all()):
        return None
    lengths = mask.bool().sum(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    if not bool((mask.bool() == (places < lengths[:, None])).all()):
        raise ValueError("the mask of text tokens leaves out some that are followed by others: pad texts at their end")
    return tuple(int(length) for length in lengths.tolist())
