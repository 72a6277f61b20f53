"""FLUX.3: blocks of image tokens alone and of text tokens alone, then blocks with one sequence of both, text first.

Tokens of reference pictures follow those that are denoised, in the common blocks. Padding of texts is attended to, so
that the texts of a call have one length. Places of image tokens have four coordinates: time, row, column and picture,
the second and third scaled. diffusers calls it from modular pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..sites import Site, dual_and_single
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .once import once_a_tensor

__all__ = ["Flux3Adapter"]

_PATCH = 2


class Flux3Adapter(NamedCallsAdapter):
    """diffusers' ``Flux3Transformer2DModel``."""

    family = "flux3"
    words_refused = (
        "FLUX.3's blocks encode one prompt a call, and rows of several prompts come as embeddings, in which no word is "
        "looked for: use an edit that looks for none, such as FreePromptEdit, ConsistEdit or MasaCtrlEdit"
    )

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        own = (
            Site(f"mode_blocks.image.{index}.attn", "dual", "image", index, block.attn.heads, 0, (), patch=_PATCH)
            for index, block in enumerate(module.mode_blocks["image"])
        )
        return (*own, *dual_and_single(module, _PATCH))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample, shown = given["hidden_states"], given.get("image_cond_hidden_states")
        height, width = _grid(given["img_ids"])
        if height * width != sample.shape[1]:
            raise ValueError(
                f"the model got {sample.shape[1]} image tokens, whose places are {height} rows and {width} columns: "
                "the grid of the picture that it denoises has to be whole"
            )
        return ModelCall(
            sample,
            given["timestep"],
            (height * _PATCH, width * _PATCH),
            half=self._half(),
            references=0 if shown is None else shown.shape[1],
            arguments=(args, kwargs),
        )


@once_a_tensor
def _grid(places: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of image tokens, from their places [N, 4]: (time, row, column, picture)."""
    return len(places[:, 1].unique()), len(places[:, 2].unique())
