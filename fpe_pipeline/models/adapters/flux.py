"""FLUX.1: dual blocks with a stream of image tokens and one of text tokens, then single blocks with one for both.

The order in a layer is text, image. The model receives latents that are packed, a token for each 2 × 2 of them, with
the place of each token, and a timestep that is scaled: the step is the scheduler's. Guidance is part of the model;
where a pipeline guides with a negative prompt as well it calls the model twice, in contexts named "cond" and "uncond".
In FLUX.1 Kontext tokens of a reference picture follow those that are denoised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ...text_parts import TextPart
from ..sites import Site, dual_and_single
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .once import once_a_tensor

__all__ = ["FluxAdapter", "FluxBlocksAdapter"]


class FluxBlocksAdapter(NamedCallsAdapter):
    """A transformer of dual and single blocks that is told the places of its tokens."""

    #: Latents across a token.
    patch: ClassVar[int] = 2

    def find_sites(self) -> tuple[Site, ...]:
        return dual_and_single(self.module, self.patch)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample, places = given["hidden_states"], given["img_ids"]
        height, width, references = _size(places)
        return ModelCall(
            sample,
            given["timestep"],
            (height * self.patch, width * self.patch),
            half=self._half(),
            references=references,
            arguments=(args, kwargs),
        )


class FluxAdapter(FluxBlocksAdapter):
    """diffusers' ``FluxTransformer2DModel``."""

    family = "flux"
    text_parts = (TextPart("tokenizer_2", ("text_encoder_2",)),)


@once_a_tensor
def _size(places: torch.Tensor) -> tuple[int, int, int]:
    """Rows and columns of the image's tokens, and how many tokens of reference pictures follow them.

    Args:
        places: of the image tokens [N, 3 | 4], or the same for each row: (picture, row, column, …).

    Raises:
        ValueError: tokens of the first picture that are no grid, or that do not come first.
    """
    places = places if places.ndim == 2 else places[0]
    pictures = places[:, 0].tolist()
    tokens = pictures.count(pictures[0])
    own = places[:tokens]
    height, width = (int(side) + 1 for side in (own.amax(0) - own.amin(0)).tolist()[1:3])
    if height * width != tokens or pictures[0] in pictures[tokens:]:
        raise ValueError(
            f"the model got {tokens} tokens of the picture that it denoises, in {height} rows and {width} columns: "
            "its grid has to be whole, and its tokens those before any of a reference picture"
        )
    return height, width, len(pictures) - tokens
