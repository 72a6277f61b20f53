"""From what users pass to the UNet that is edited, and what its batches hold."""

from __future__ import annotations

import inspect
from typing import Any

import torch

__all__ = ["check_images", "identity", "is_guided", "pipe_and_unet"]

_VIDEO_UNETS = ("UNetMotionModel", "UNet3DConditionModel", "UNetSpatioTemporalConditionModel", "I2VGenXLUNet")
_VIDEO_ARGUMENTS = ("num_frames", "video_length", "video")


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


def check_images(pipe: Any | None, unet: Any) -> None:
    """Raise ValueError for a model whose batches are no images: videos, and the views of a panorama."""
    name = type(identity(unet)).__name__
    taken = inspect.signature(type(pipe).__call__).parameters if callable(pipe) else {}
    if name in _VIDEO_UNETS or any(argument in taken for argument in _VIDEO_ARGUMENTS):
        what = name if pipe is None else f"{type(pipe).__name__} with its {name}"
        raise ValueError(
            f"{what} makes videos: its attention sees frames as rows of the batch, which no edit describes yet; edit "
            "with a pipeline that makes images"
        )
    if hasattr(pipe, "get_views"):
        raise ValueError(
            f"{type(pipe).__name__} denoises overlapping views of a panorama one by one, and mixes their rows: an edit "
            "cannot tell the views apart; edit with a pipeline that denoises the image as a whole"
        )


def identity(unet: Any) -> torch.nn.Module:
    """The module itself, without the wrapper of ``torch.compile``."""
    return getattr(unet, "_orig_mod", unet)


def is_guided(pipe: Any | None, encoded: bool | None = None) -> bool:
    """Whether the UNet batches of a pipeline's call hold an unconditional half; asked while the call is under way.

    Args:
        pipe: the pipeline.
        encoded: what it encoded, which counts where the pipeline itself does not say.

    Raises:
        ValueError: it cannot be told, or the batch has further parts.
    """
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        raise ValueError("perturbed-attention guidance adds rows to the batch: describe its layout with roles=")
    try:
        guided = bool(pipe.do_classifier_free_guidance)  # type: ignore[union-attr]
    except AttributeError:
        if encoded is not None:
            return encoded
        what = "a UNet alone" if pipe is None else type(pipe).__name__
        raise ValueError(
            f"{what} does not say whether the batch holds an unconditional half: pass "
            "editing(..., classifier_free_guidance=True or False)"
        ) from None
    if guided and hasattr(type(pipe), "image_guidance_scale"):
        raise ValueError(
            f"{type(pipe).__name__} guides by image too, so its batch has three parts and not two: describe "
            "its layout with roles="
        )
    return guided
