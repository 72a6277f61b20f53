"""LTX-2: a stream of video tokens and one of sound, each of which attends to itself, to the text and to the other.

Edits are of the video's attention to itself; sound is each row's own. The model receives tokens in one dimension, with
the number of frames, rows and columns. The batch is [unconditional, conditional] in one call; guidance by perturbed
layers and by streams that do not see one another are calls of their own, of the rows that see their prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..sites import Site
from .adapter import Half, ModelCall
from .ltx import size_of_tokens
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
        size = size_of_tokens(given, "LTX2")
        return ModelCall(given["hidden_states"], given["timestep"], size, half=self._half(), arguments=(args, kwargs))

    def _half(self) -> Half:
        return "conditional" if self._context in _ALONE else "as guided"
