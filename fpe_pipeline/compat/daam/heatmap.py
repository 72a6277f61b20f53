"""Heat maps as DAAM's users know them: of all tokens, of a word, and the collection that they are merged from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ...heatmaps.views import overlay
from ..given import factor

__all__ = ["GlobalHeatMap", "RawHeatMapCollection", "WordHeatMap"]

_TINY = 1e-8


class WordHeatMap:
    """The heat of a word.

    Args:
        heatmap: [height, width], float32.
        word: as it was asked for.
        word_idx: the position that was asked for in its place.
        compat: "original" swaps height and width in `expand_as`, as DAAM does.
    """

    def __init__(
        self, heatmap: torch.Tensor, word: str | None = None, word_idx: int | None = None, *, compat: str | None = None
    ) -> None:
        self.heatmap, self.word, self.word_idx = heatmap, word, word_idx
        self._swaps = compat == "original"

    @property
    def value(self) -> torch.Tensor:
        """The heat."""
        return self.heatmap

    def expand_as(
        self,
        image: Any,
        absolute: bool = False,
        threshold: float | None = None,
        plot: bool = False,
        **plot_options: Any,
    ) -> torch.Tensor:
        """The heat at the size of a picture: [height, width], float32, on the CPU.

        Args:
            image: a PIL image.
            absolute: leave values as they are; by default they are spread over 0 to 1.
            threshold: 1 above it and 0 elsewhere; DAAM's own code (compat="original") passes over 0.
            plot: draw it too, with ``plot_options`` of `plot_overlay`.

        Raises:
            TypeError: no PIL image.
            ValueError: a threshold that is no number.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"expected image to be a PIL image, got {type(image).__name__}: open paths with PIL.Image.open, and "
                "make one of an array [H, W, 3] of bytes with PIL.Image.fromarray"
            )
        threshold = None if threshold is None else factor("threshold", threshold)
        width, height = image.size
        size = (width, height) if self._swaps else (height, width)
        heat = F.interpolate(self.heatmap[None, None].detach().float(), size=size, mode="bicubic")[0, 0].cpu()
        if not absolute:
            heat = (heat - heat.min()) / (heat.max() - heat.min() + _TINY)
        if threshold is not None and (threshold or not self._swaps):
            heat = (heat > threshold).float()
        if plot:
            self.plot_overlay(image, **plot_options)
        return heat

    def plot_overlay(
        self, image: Any, out_file: Any = None, color_normalize: bool = True, ax: Any = None, **expand_options: Any
    ) -> Any:
        """The picture with the heat laid over it, from transparent to red.

        Args:
            image: a PIL image.
            out_file: where it is saved. Without it, and without ``ax``, the picture also is on the current figure of
                matplotlib, for ``plt.show()``, where the caller has imported pyplot.
            color_normalize: spread the colours over the values that there are; otherwise over 0 to 1.
            ax: axes of matplotlib to show it on.
            **expand_options: of `expand_as`.

        Returns:
            The PIL image. matplotlib is not needed where ``ax`` is None.

        Raises:
            TypeError: no PIL image.
        """
        heat = self.expand_as(image, **expand_options)
        width, height = image.size
        heat = heat.T if self._swaps else heat
        share = heat.numpy() if color_normalize else np.clip(heat.numpy(), 0.0, 1.0)
        drawn = overlay(share, image, 0.6 if color_normalize else 0.6 * float(share.max()))
        if out_file is not None:
            drawn.save(out_file)
        plt = sys.modules.get("matplotlib.pyplot")
        if ax is None and out_file is None and plt is not None:
            plt.clf()
            ax = plt.gca()
        if ax is not None:
            ax.imshow(drawn, extent=(0, width, height, 0))
            if self.word is not None:
                ax.set_title(self.word)
        return drawn

    def compute_ioa(self, other: WordHeatMap) -> float:
        """How much of this word's heat lies where the other's is: the sum of their product over the sum of this one."""
        return float((self.heatmap * other.heatmap).sum() / (self.heatmap.sum() + _TINY))


class GlobalHeatMap:
    """The heat of every token of a prompt.

    Args:
        tokenizer: the pipeline's.
        prompt: whose tokens they are.
        heat_maps: [tokens + 2, height, width]: the start token, the prompt's and the end's.
    """

    def __init__(self, tokenizer: Any, prompt: str, heat_maps: torch.Tensor, *, compat: str | None = None) -> None:
        self.tokenizer, self.prompt, self.heat_maps = tokenizer, prompt, heat_maps
        self._compat = compat

    def compute_word_heat_map(self, word: str, word_idx: int | None = None, offset_idx: int = 0) -> WordHeatMap:
        """The heat of a word: the mean over its tokens, wherever they occur.

        Args:
            word: a word or phrase, in any case.
            word_idx: the position of a token, from 0 behind the start token, in place of the word's.
            offset_idx: added to the positions where the word was found.

        Raises:
            TypeError: a word that is no text, or a position that is no whole number.
            ValueError: the prompt does not hold the word, or has no token there.
        """
        if not isinstance(word, str) or (word_idx is not None and not hasattr(word_idx, "__index__")):
            raise TypeError(
                f"expected word to be a text and word_idx a whole number, got {word!r} and {word_idx!r}: ask "
                "for each word"
            )
        if word_idx is None:
            places = [place + offset_idx for place in self._places(word)]
        else:
            places = [word_idx]
        if not all(0 <= place + 1 < len(self.heat_maps) for place in places):
            raise ValueError(
                f"there are heat maps of the tokens 0 to {len(self.heat_maps) - 2} of {self.prompt!r}, and none of "
                f"{[place for place in places if not 0 <= place + 1 < len(self.heat_maps)]}"
            )
        heat = self.heat_maps[[place + 1 for place in places]].mean(0)
        return WordHeatMap(heat, word, word_idx, compat=self._compat)

    def _places(self, word: str) -> list[int]:
        """Positions of a word's tokens among the prompt's."""
        tokens, wanted = (self.tokenizer.tokenize(text.lower()) for text in (self.prompt, word))
        starts = [start for start in range(len(tokens)) if wanted and tokens[start : start + len(wanted)] == wanted]
        if not starts:
            raise ValueError(f"the prompt {self.prompt!r} does not hold {word!r}")
        return [start + place for start in starts for place in range(len(wanted))]

    def parsed_heat_maps(self) -> Any:
        """Not served."""
        raise NotImplementedError("prompts are not parsed here: ask compute_word_heat_map for each word")

    dependency_relations = parsed_heat_maps


class RawHeatMapCollection:
    """What a trace has read: by (factor, layer, head) the sums over steps [tokens, h, w]."""

    def __init__(self, maps: Mapping[tuple[int, int, int], torch.Tensor]) -> None:
        self.ids_to_heatmaps = dict(maps)

    def __iter__(self) -> Iterator[tuple[tuple[int, int, int], torch.Tensor]]:
        return iter(self.ids_to_heatmaps.items())

    def __len__(self) -> int:
        return len(self.ids_to_heatmaps)

    def factors(self) -> set[int]:
        """How many times smaller than the latent the layers are."""
        return {factor for factor, _, _ in self.ids_to_heatmaps}

    def layers(self) -> set[int]:
        """The numbers of the layers."""
        return {layer for _, layer, _ in self.ids_to_heatmaps}

    def heads(self) -> set[int]:
        """The numbers of the heads."""
        return {head for _, _, head in self.ids_to_heatmaps}
