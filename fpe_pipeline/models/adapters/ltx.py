"""LTX-Video: blocks of self-attention over all tokens of a video and of cross-attention over text tokens.

The model receives latents whose tokens are in one dimension already, with the number of frames, rows and columns. The
batch is [unconditional, conditional] in one call; padding of a text is masked. The step is the scheduler's: where a
picture is part of the video, its tokens have a timestep of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..sites import Site
from ..steps import Step, step_of_scheduler
from .adapter import ModelCall
from .transformer import TransformerAdapter, self_and_cross

__all__ = ["LTXAdapter", "size_of_tokens"]


class LTXAdapter(TransformerAdapter):
    """diffusers' ``LTXVideoTransformer3DModel``."""

    family = "ltx"

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        return tuple(self_and_cross("transformer_blocks", module.transformer_blocks))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        size = size_of_tokens(given, "LTX")
        return ModelCall(given["hidden_states"], given["timestep"], size, arguments=(args, kwargs))

    def step(self, call: ModelCall) -> Step:
        return super().step(call) if self.pipe is None else step_of_scheduler(self.pipe.scheduler)


def size_of_tokens(given: Mapping[str, Any], pipelines: str) -> tuple[Any, ...]:
    """(height, width, frames) of a call whose tokens [B, N, C] are in one dimension.

    Args:
        given: the call's arguments by name.
        pipelines: what the names of its pipelines begin with.

    Raises:
        ValueError: other tokens among them, such as those of frames that are given.
    """
    tokens = given["hidden_states"].shape[1]
    size = tuple(given.get(name) for name in ("height", "width", "num_frames"))
    if None in size or math.prod(size) != tokens:  # type: ignore[arg-type]
        raise ValueError(
            f"the model got {tokens} tokens for (height, width, frames) = {size}: tokens of given frames among them "
            f"({pipelines}ConditionPipeline) are not described yet; edit with {pipelines}Pipeline or "
            f"{pipelines}ImageToVideoPipeline"
        )
    return size
