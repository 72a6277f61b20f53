"""From what users pass to the UNet that is edited."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["identity", "pipe_and_unet"]


def pipe_and_unet(pipe: Any) -> tuple[Any, Any]:
    """A pipeline and its UNet; (None, UNet) for a UNet alone; TypeError for anything else."""
    if hasattr(pipe, "attn_processors"):
        return None, pipe
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise TypeError(
            f"expected a diffusers pipeline with a unet, or a UNet, got {type(pipe).__name__}"
            + (" (transformer pipelines are not supported yet)" if hasattr(pipe, "transformer") else "")
        )
    return pipe, unet


def identity(unet: Any) -> torch.nn.Module:
    """The module itself, without the wrapper of ``torch.compile``."""
    return getattr(unet, "_orig_mod", unet)
