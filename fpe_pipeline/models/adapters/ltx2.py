"""LTX-2: a stream of video tokens and one of sound, each of which attends to itself, to the text and to the other.

Edits are of the video's attention to itself; sound is each row's own. The model receives tokens in one dimension, with
the number of frames, rows and columns. The batch is [unconditional, conditional] in one call; guidance by perturbed
layers and by streams that do not see one another are calls of their own, of the rows that see their prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..sites import Site
from .adapter import Half, ModelCall
from .named_calls import NamedCallsAdapter
from .transformer import self_and_cross

__all__ = ["LTX2Adapter"]

_ALONE = ("uncond_stg", "uncond_modality")


class LTX2Adapter(NamedCallsAdapter):
    """diffusers' ``LTX2VideoTransformer3DModel``."""

    family = "ltx2"
    guides_apart = False
    words_refused = (
        "LTX-2's connectors make other tokens of a prompt's, among which no word is looked for: use an edit that looks "
        "for none, such as FreePromptEdit or MasaCtrlEdit"
    )

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        return tuple(self_and_cross("transformer_blocks", module.transformer_blocks))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample = given["hidden_states"]
        size: tuple[Any, ...] = tuple(given.get(name) for name in ("height", "width", "num_frames"))
        if None in size or math.prod(size) != sample.shape[1]:
            raise ValueError(
                f"the model got {sample.shape[1]} tokens for (height, width, frames) = {size}: tokens of given frames "
                "among them (LTX2ConditionPipeline) are not described yet; edit with LTX2Pipeline or "
                "LTX2ImageToVideoPipeline"
            )
        return ModelCall(sample, given["timestep"], size, half=self._half(), arguments=(args, kwargs))

    def _half(self) -> Half:
        return "conditional" if self._context in _ALONE else "as guided"
