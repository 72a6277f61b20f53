"""Local blend: what lies outside the words of interest stays the source image's."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from ..prompts.encoding import Encoding
from ..prompts.joint_text import JointPrompt, encoded_prompts
from ..prompts.words import TokenizedPrompt
from .base import Edit, Windows, check_compat
from .masks import blended_sites
from .products import Product
from .prompt_to_prompt import tokenize_prompts
from .selection import unit_number, whole_numbers
from .watchers import HeatCollector, Watcher

__all__ = ["LocalBlend"]


@dataclass(frozen=True)
class LocalBlend(Edit):
    """Prompt-to-Prompt's local blend, beside any edit: ``PromptToPromptEdit(…) + LocalBlend(…)``.

    After each step, a target's latents outside a mask become the source's. The mask is where the heat of the chosen
    words, in the source's or in the target's own edited cross-attention, summed over the steps so far, exceeds a
    share of its largest value. Heat is a few more value columns of the layers' products; no map is stored. In a
    transformer (Stable Diffusion 3, FLUX) it is that of image queries over text keys in all layers of joint attention.

    Args:
        prompts: the source prompt and its targets, in the order of the pipeline call.
        tokenizer: the pipeline's.
        words: for each prompt a word, or several, of it.
        threshold: share of the largest heat.
        start: a share s of the run; the first ``int(T·s)`` steps are not blended.
        levels: levels of cross-attention whose heat is read; default: level 2, which is 16² tokens at 512 px. A
            transformer has none.
        compat: ``"original"`` counts calls of the model rather than steps for ``start``, as the authors' code does.

    Raises:
        ValueError: a prompt without its word, or a number outside [0, 1].

    Reference: Hertz et al., "Prompt-to-Prompt Image Editing with Cross-Attention Control", ICLR 2023.
    """

    prompts: Sequence[str]
    tokenizer: Any = field(repr=False, compare=False)
    words: Sequence[str | Sequence[str]]
    threshold: float = 0.3
    start: float = field(default=0.0, kw_only=True)
    levels: Any = field(default=None, kw_only=True)
    compat: Literal["original"] | None = field(default=None, kw_only=True)
    _tokens: tuple[tuple[int, ...], ...] = field(default=(), init=False, repr=False, compare=False)
    _length: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_compat(self.compat)
        prompts = tokenize_prompts(self.prompts, self.tokenizer)
        given = (self.words,) if isinstance(self.words, str) else tuple(self.words)
        words = tuple(_words(entry) for entry in given)
        if len(words) != len(prompts) or not all(words):
            raise ValueError(f"expected a word, or several, for each of {len(prompts)} prompts, got {self.words!r}")
        self._normalise(
            prompts=tuple(prompt.text for prompt in prompts),
            words=words,
            threshold=unit_number(self.threshold, "threshold"),
            start=unit_number(self.start, "start"),
            levels=None if self.levels is None else whole_numbers("levels", self.levels),
            _tokens=tuple(_tokens_of(prompt, entry) for prompt, entry in zip(prompts, words, strict=True)),
            _length=prompts[0].length,
        )

    def phase(self, step: Step) -> Hashable:
        return ()

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product]:
        return {}

    def written_for(self) -> tuple[str, ...]:
        """The prompts that it is written for, the source's first."""
        return tuple(self.prompts)

    def encoded(self, encoding: Encoding) -> LocalBlend:
        """The edit for what the pipeline encodes."""
        return self  # its watcher places the words

    def windows(self) -> Windows:
        return ((f"start={self.start:g}", self.blends_at),)

    def blends_at(self, step: Step) -> bool:
        """Whether latents are blended after a step."""
        return step.place(self.compat) >= int(step.total * self.start)

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return ()

    def watchers(self) -> tuple[Watcher, ...]:
        """What follows the run for it."""
        return (_Blend(self),)


class _Blend(HeatCollector):
    blends = True

    def __init__(self, edit: LocalBlend) -> None:
        super().__init__(
            [[tokens] for tokens in edit._tokens], edit._length, lambda sites: blended_sites(sites, edit.levels)
        )
        self._edit = edit

    def encoded(self, encoding: Encoding) -> None:
        edit = self._edit
        if encoding.prompts is not None:
            prompts = encoded_prompts(encoding, tokenize_prompts(edit.prompts, edit.tokenizer))
            tokens = [[_tokens_of(prompt, words)] for prompt, words in zip(prompts, edit.words, strict=True)]
            self.watch_tokens(tokens, prompts[0].length)

    def blend(self, latents: torch.Tensor, step: Step, roles: BatchRoles) -> torch.Tensor:
        if not self._edit.blends_at(step):
            return latents
        # After a step that ended with a call of the unconditional rows alone, its rows are the same images.
        half = any(roles.conditional)
        rows = roles.select(conditional=half)
        if latents.shape[0] != len(rows):
            raise ValueError(
                f"a local blend needs latents for each of the batch's {len(rows)} images, got {latents.shape[0]} rows"
            )
        masks = {row: self._mask(roles.image_of(row), latents) for row in rows}
        out = latents.clone()
        for source, target in roles.pairs(conditional=half):
            of_source, of_target = masks[source], masks[target]
            if of_source is not None and of_target is not None:
                mask, here, there = of_source | of_target, rows.index(target), rows.index(source)
                out[here] = torch.where(mask, latents[here], latents[there])
        return out

    def _mask(self, image: tuple[int, int], latents: torch.Tensor) -> torch.Tensor | None:
        """Where the words are, at the resolution of latents [rows, C, h, w] or [rows, C, 1, h, w], as [1, h, w], or as
        [tokens, 1] of packed ones [rows, tokens, C]; None where nothing was read of an image."""
        heat = self.heat(image)
        if heat is None:
            return None
        heat = torch.nn.functional.max_pool2d(heat[None], 3, stride=1, padding=1)
        if latents.ndim > 3:
            heat = torch.nn.functional.interpolate(heat, size=latents.shape[-2:])
        mask = heat[0] / heat.amax() > self._edit.threshold
        return mask if latents.ndim > 3 else mask.reshape(-1, 1)  # a packed latent is a token of the layers


def _words(entry: Any) -> tuple[str, ...]:
    """The words of a prompt; none where what was given is none."""
    given = (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, Iterable) else ()
    return given if all(isinstance(word, str) for word in given) else ()


def _tokens_of(prompt: TokenizedPrompt | JointPrompt, words: Sequence[str]) -> tuple[int, ...]:
    return tuple(sorted({token for word in words for token in prompt.find(word)}))
