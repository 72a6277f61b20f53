"""Free-Prompt-Editing as what ComfyUI's UNets take in the place of a self-attention layer.

Such a replacement is given queries, keys and values [rows, tokens, heads × head dim] and returns the layer's output.
The rows are the images of the batch, once for each conditioning, and ``cond_or_uncond`` says which of these is which.
The first image is the source: in conditional rows every other image has its map, ``A_source @ v_target``, which is
computed once for all of them and not stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fpe_kernels import shared_attention

__all__ = ["SharedMaps", "by_head", "is_edited", "level_of", "maps_of_rows", "step_of"]

#: What ComfyUI writes into ``cond_or_uncond`` for rows of the positive prompt.
_CONDITIONAL = 0


@dataclass(frozen=True)
class SharedMaps:
    """Replaces ``attn1`` of any block.

    Args:
        start, stop: the steps with ``int(total * start) <= index < int(total * stop)`` are edited.
        strength: 1 for the source's map alone, less for a blend with the target's own.
        least_level: layers are edited whose sides are at most the latent's divided by two to this power.
        backend: one of ``fpe_kernels.backends()``, or "auto".
    """

    start: float = 0.0
    stop: float = 0.8
    strength: float = 1.0
    least_level: int = 1
    backend: str = "auto"

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Mapping[str, Any]
    ) -> torch.Tensor:
        """Output [rows, tokens, heads × head dim] of the layer that ``options`` describes.

        Raises:
            ValueError: one image alone in the batch, or a ComfyUI that does not tell its steps.
        """
        heads = int(options["n_heads"])
        if not self._acts(query.shape[1], options):
            return _ordinary(query, key, value, heads)
        maps = maps_of_rows(query.shape[0], options["cond_or_uncond"])
        targets = [row for row, source in enumerate(maps) if source != row]
        if not targets:  # ComfyUI may ask for the rows of the negative prompt alone
            return _ordinary(query, key, value, heads)
        first = sorted(set(maps))
        query, key, value = (by_head(states, heads) for states in (query, key, value))
        index = [first.index(row) for row in maps]
        out = shared_attention(query[first], key[first], value, map_index=index, backend=self.backend)
        if self.strength < 1:
            states = (query[targets], key[targets], value[targets])
            own = shared_attention(*states, map_index=list(range(len(targets))), backend=self.backend)
            out[targets] = torch.lerp(own, out[targets], self.strength)
        return out.transpose(1, 2).flatten(2)

    def _acts(self, tokens: int, options: Mapping[str, Any]) -> bool:
        if not is_edited(self.start, self.stop, options):
            return False
        return level_of(tokens, options["original_shape"]) >= self.least_level


def maps_of_rows(rows: int, chunks: Sequence[int]) -> list[int]:
    """For each row, the row whose map it has.

    Args:
        rows: of the batch, a multiple of the number of chunks.
        chunks: ``cond_or_uncond``: for each repetition of the images, whether they see the positive prompt.

    Raises:
        ValueError: there is no target.
    """
    images = rows // len(chunks)
    if images < 2:
        raise ValueError(
            "Free-Prompt-Editing needs a batch of a source and its targets, got one image: make prompts and latents "
            "with the node 'Free-Prompt source and targets'"
        )
    return [
        chunk * images if kind == _CONDITIONAL else chunk * images + image
        for chunk, kind in enumerate(chunks)
        for image in range(images)
    ]


def step_of(options: Mapping[str, Any]) -> tuple[int, int]:
    """(index, total) of the step at hand, from the noise levels of it and of the run.

    A sampler that asks the model between two steps is in the earlier of them.
    """
    if "sample_sigmas" not in options:
        raise ValueError("this ComfyUI does not tell its steps (transformer_options['sample_sigmas']): update it")
    levels = torch.as_tensor(options["sample_sigmas"], dtype=torch.float64).flatten()[:-1]
    now = torch.as_tensor(options["sigmas"], dtype=torch.float64).flatten()[0].to(levels.device)
    return max(int((levels >= now * (1 - 1e-5)).sum()) - 1, 0), len(levels)


def is_edited(start: float, stop: float, options: Mapping[str, Any]) -> bool:
    """Whether the step at hand is in the window ``[int(total * start), int(total * stop))``."""
    index, total = step_of(options)
    return int(total * start) <= index < int(total * stop)


def level_of(tokens: int, latents: Sequence[int]) -> int:
    """How often a layer of ``tokens`` has halved the sides of latents of shape [rows, channels, height, width]."""
    return round(math.log(latents[-2] * latents[-1] / tokens, 4))


def by_head(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[rows, tokens, heads × D] as [rows, heads, tokens, D]."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def _ordinary(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """What ComfyUI itself would compute: it is there whenever a model is."""
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(query, key, value, heads)
