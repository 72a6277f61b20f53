"""UNets: text in cross-attention layers, image in self-attention layers, one call a step for all rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..sites import Site, attention_sites
from .adapter import ModelAdapter, ModelCall

__all__ = ["UNetAdapter"]

_VIDEO_UNETS = ("UNetMotionModel", "UNet3DConditionModel", "UNetSpatioTemporalConditionModel", "I2VGenXLUNet")
_VIDEO_ARGUMENTS = ("num_frames", "video_length", "video")


class UNetAdapter(ModelAdapter):
    """A diffusers UNet, which receives latents [B, C, h, w] and the timestep as the scheduler has it."""

    word = "UNet"
    family = "unet"

    def find_sites(self) -> tuple[Site, ...]:
        return attention_sites(self.model)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        return ModelCall(sample, timestep, (sample.shape[-2], sample.shape[-1]), arguments=(args, kwargs))

    def check(self) -> None:
        """Refuse models whose batches are no images, videos and the views of a panorama, and two networks in one."""
        name, pipe = type(self.module).__name__, self.pipe
        taken = inspect.signature(type(pipe).__call__).parameters if callable(pipe) else {}
        if name in _VIDEO_UNETS or any(argument in taken for argument in _VIDEO_ARGUMENTS):
            what = name if pipe is None else f"{type(pipe).__name__} with its {name}"
            raise ValueError(
                f"{what} makes videos: its attention sees frames as rows of the batch, which no edit describes yet; "
                "edit with a pipeline that makes images"
            )
        if name == "UNetControlNetXSModel":
            raise ValueError(
                "a UNetControlNetXSModel holds two networks, whose layers take turns in its blocks: no edit describes "
                "them yet; edit its own UNet by itself, or beside an ordinary ControlNet"
            )
        if hasattr(pipe, "get_views"):
            raise ValueError(
                f"{type(pipe).__name__} denoises overlapping views of a panorama one by one, and mixes their rows: an "
                "edit cannot tell the views apart; edit with a pipeline that denoises the image as a whole"
            )
