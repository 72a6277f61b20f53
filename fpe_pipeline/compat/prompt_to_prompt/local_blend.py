"""Prompt-to-Prompt's ``LocalBlend``: what lies outside the words of interest stays the source's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from ...edits.selection import unit_number
from ...errors import check_positive
from ..given import listed
from ..lazy import LazyMap
from ..switch import chosen_compat
from .word_tokens import Compat, tokens_of_words

__all__ = ["LocalBlend"]

# Times that the latent's sides are halved in the layers that are read: 16² maps of 64² latents.
HALVED = 4


class LocalBlend:
    """After each step, latents outside a mask become those of the first image.

    The mask is where the maps of some words, of the cross-attention layers at a quarter of the latents' sides on the
    way down and up, exceed a share of their largest value. Only the words' columns are computed.

    Args:
        prompts: the source prompt and its targets.
        words: for each prompt a word of it, or several.
        threshold: share of the largest value.
        substruct_words: as ``words``, for regions that are cut out of the mask.
        start_blend: the share of the steps, at the beginning, after which nothing is blended.
        th: thresholds of the words and of those that are cut out, or one for both; default: ``threshold``.
        num_steps: of the run, which ``start_blend`` is a share of.
        tokenizer: the pipeline's; default: that of the pipeline where the controller is registered.
        compat: ``"original"`` takes no notice of words that are in no prompt.

    Raises:
        ValueError: no words for each prompt, thresholds or ``start_blend`` outside of 0 to 1, a number of steps that is
            none; later, a word that is not in its prompt.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        words: Sequence[str | Sequence[str]],
        threshold: float = 0.3,
        *,
        substruct_words: Sequence[str | Sequence[str]] | None = None,
        start_blend: float = 0.0,
        th: float | tuple[float, float] | None = None,
        num_steps: int = 50,
        tokenizer: Any = None,
        compat: Compat = None,
    ) -> None:
        self.compat, self.prompts = chosen_compat(compat), listed(prompts)
        self.words = self._of_prompts("words", words, may_lack=self.compat == "original")
        self.substruct_words = (
            None if substruct_words is None else self._of_prompts("substruct_words", substruct_words, may_lack=True)
        )
        self.th = _thresholds(threshold if th is None else th)
        check_positive(num_steps=num_steps)
        self.start_blend, self.tokenizer = int(unit_number(start_blend, "start_blend") * num_steps), tokenizer
        self.counter = 0

    def _of_prompts(self, name: str, words: Any, *, may_lack: bool) -> list[list[str]]:
        """For each prompt its words; refused here, not in the first step of a run."""
        plain = words.tolist() if hasattr(words, "tolist") else words
        given = [] if isinstance(plain, str) or not isinstance(plain, Sequence) else plain
        lists = [[one] if isinstance(one, str) else one for one in given]
        if len(lists) != len(self.prompts) or not all(
            isinstance(one, Sequence) and (one or may_lack) and all(isinstance(word, str) for word in one)
            for one in lists
        ):
            raise ValueError(
                f"{name}: expected words for each of {len(self.prompts)} prompts, a text or a list of texts each, got "
                f"{words!r}"
            )
        return [list(one) for one in lists]

    def prepare(self, tokenizer: Any) -> None:
        """Take the tokenizer of the pipeline where none was passed."""
        self.tokenizer = tokenizer if self.tokenizer is None else self.tokenizer

    def reset(self) -> None:
        """Begin again with the first step."""
        self.counter = 0

    @cached_property
    def alpha_layers(self) -> torch.Tensor:
        """[prompts, 1, 1, 1, 1, M]: 1 for the words' tokens."""
        return self._columns(self.words)

    @cached_property
    def substruct_layers(self) -> torch.Tensor | None:
        """The same for what is cut out; None where nothing is."""
        return None if self.substruct_words is None else self._columns(self.substruct_words)

    def _columns(self, words: Sequence[Sequence[str]]) -> torch.Tensor:
        rows = []
        for prompt, chosen in zip(self.prompts, words, strict=True):
            length, tokens = tokens_of_words(prompt, chosen, self.tokenizer, self.compat)
            row = torch.zeros(length)
            row[[token for found in tokens for token in found]] = 1.0
            rows.append(row)
        return torch.stack(rows)[:, None, None, None, None]

    def __call__(self, x_t: torch.Tensor, attention_store: Mapping[str, Sequence[LazyMap]]) -> torch.Tensor:
        """The latents [prompts, C, h, w] after a step, blended.

        Args:
            x_t: the latents.
            attention_store: sums of maps by "<place>_<self | cross>", as :class:`.AttentionStore` has them.
        """
        self.counter += 1
        if self.counter <= self.start_blend:
            return x_t
        size = _read_size(x_t)
        read = [*attention_store["down_cross"], *attention_store["up_cross"]]
        maps = [attn for attn in read if attn.shape[1] == size[0] * size[1]]
        if not maps:
            raise ValueError(
                f"no cross-attention layer of the UNet's down and up blocks has {size[0]} × {size[1]} tokens, a "
                f"quarter of the latents' sides {tuple(x_t.shape[-2:])}: a local blend of this UNet has no maps to read"
            )
        mask = self.get_mask(maps, self.alpha_layers, True, x_t)
        if self.substruct_layers is not None:
            mask = mask & ~self.get_mask(maps, self.substruct_layers, False, x_t)
        return torch.where(mask, x_t, x_t[:1])

    def get_mask(self, maps: Sequence[LazyMap], alpha: torch.Tensor, use_pool: bool, x_t: torch.Tensor) -> torch.Tensor:
        """[prompts, 1, h, w]: where the words are, in the first image or in one's own."""
        size = _read_size(x_t)
        prompts, tokens = alpha.shape[0], alpha.shape[-1]
        # [prompts, heads of all layers, 1, *size]
        heat = torch.cat([(attn.reshape(prompts, -1, 1, *size, tokens) * alpha).sum(-1) for attn in maps], dim=1).mean(
            1
        )
        if use_pool:
            heat = F.max_pool2d(heat, 3, stride=1, padding=1)
        mask = F.interpolate(heat, size=x_t.shape[-2:])
        mask = mask / mask.amax((2, 3), keepdim=True) > self.th[0 if use_pool else 1]
        return mask[:1] | mask


def _thresholds(given: Any) -> tuple[float, float]:
    """Of the words, and of those that are cut out."""
    plain = given.tolist() if hasattr(given, "tolist") else given
    both = list(plain) if isinstance(plain, list | tuple) else [plain] * 2
    if len(both) != 2:
        raise ValueError(
            f"th: expected two thresholds, of words and of substruct_words, or one for both, got {given!r}"
        )
    return unit_number(both[0], "threshold"), unit_number(both[1], "threshold")


def _read_size(x_t: torch.Tensor) -> tuple[int, int]:
    """The grid of the layers that are read: a UNet rounds an odd side up where it halves it."""
    height, width = (-(-side // HALVED) for side in x_t.shape[-2:])
    return height, width
