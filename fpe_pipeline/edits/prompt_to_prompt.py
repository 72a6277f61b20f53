"""Prompt-to-Prompt: word swap, refinement and re-weighting."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from typing import Any, Literal

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, StepWindow
from ..prompts.alignment import align_refine, align_replace
from ..prompts.encoding import Encoding
from ..prompts.joint_text import JointPrompt, aligned, encoded_prompts
from ..prompts.words import TokenizedPrompt, tokenize
from .base import Windows, check_compat
from .joint_products import AnyProduct, JointProduct
from .products import Product
from .selection import LayerSelection
from .self_attention import SelfAttentionEdit
from .word_columns import TargetColumns, block_products

__all__ = ["PromptToPromptEdit", "tokenize_prompts"]

_ALIGN = {"replace": align_replace, "refine": align_refine}


@dataclass(frozen=True)
class PromptToPromptEdit(SelfAttentionEdit):
    """Prompt-to-Prompt: a target's cross-attention columns are those of the source's words in their place.

    With a mapper M of source tokens to target tokens, α the replaced tokens at this step and c their weights, the
    target's map ``(A_source M) diag(α c) + A_target diag(1 - α)`` times its values is, on the values' side,
    ``A_source @ (M (α c ⊙ v)) + A_target @ ((1 - α) ⊙ v)``. Self-attention maps are replaced as a whole. Only the
    conditional half is edited.

    A transformer's layers (Stable Diffusion 3, FLUX) attend to image and text tokens under one softmax. There the
    columns of cross-attention are those of image queries over text keys, of CLIP and of T5 where a word has tokens of
    both, and self-attention is the block of image queries over image keys; text queries keep their own map.

    Args:
        prompts: the source prompt and its targets, in the order of the pipeline call.
        tokenizer: the pipeline's (of SDXL's two, either: they have one vocabulary).
        align: ``"replace"`` pairs words by their place and wants equally many; ``"refine"`` pairs the words that the
            prompts have in common, and the target's other words keep their own columns.
        cross_replace_steps: a number s for the steps ``[0, int((T + 1)·s))``, or a pair, or a mapping with either
            for some words of the targets and, under ``"default_"``, for all others (default: all steps).
        self_replace_steps: a number s for the steps ``[0, int(T·s))``, or a pair; 0 leaves self-attention alone.
        weights: factors of words of the targets, such as ``{"fluffy": 3.0, "red": -1.0}``, while they are replaced.
            As in the original, maps are not renormalised.
        source_of: for each prompt, the index of its source; default: all from prompt 0. As the session's.
        compat: ``"original"`` for the mappers of the authors' code, which does not move the tokens after a word whose
            number of tokens changes; and for its count of steps, which is of calls of the model (PNDM makes one more).
        levels, max_tokens, layers: at most one, to choose the *self-attention* layers; default: levels from 2 on,
            which is what the original's limit of 16² tokens means at 512 px, and all layers of a transformer, which
            has no levels. Cross-attention is edited everywhere.

    Raises:
        ValueError: prompts that do not align, words that are in no target, factors that are no numbers.
        TypeError: prompts that are no list of text, or no tokenizer.

    Reference: Hertz et al., "Prompt-to-Prompt Image Editing with Cross-Attention Control", ICLR 2023.
    """

    prompts: Sequence[str]
    tokenizer: Any = field(repr=False, compare=False)
    align: Literal["replace", "refine"] = "replace"
    cross_replace_steps: Any = 0.8
    self_replace_steps: Any = 0.4
    weights: Any = ()
    source_of: Sequence[int] | None = field(default=None, kw_only=True)
    compat: Literal["original"] | None = field(default=None, kw_only=True)
    _targets: Mapping[int, TargetColumns] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.align not in _ALIGN:
            raise ValueError(f"expected align to be one of {sorted(_ALIGN)}, got {self.align!r}")
        check_compat(self.compat)
        prompts = tokenize_prompts(self.prompts, self.tokenizer)
        if len(prompts) < 2:
            raise ValueError(f"expected the source prompt and at least one target, got {len(prompts)} prompt(s)")
        sources = (0,) * len(prompts) if self.source_of is None else tuple(self.source_of)
        if len(sources) != len(prompts) or not all(0 <= source < len(prompts) for source in sources):
            raise ValueError(f"expected source_of to name a source for each of {len(prompts)} prompts, got {sources}")
        self._normalise(
            prompts=tuple(prompt.text for prompt in prompts),
            self_replace_steps=StepWindow.parse(self.self_replace_steps),
            cross_replace_steps=_word_windows(self.cross_replace_steps),
            weights=_factors(self.weights),
            source_of=sources,
        )
        targets = {number: prompts[number] for number, source in enumerate(sources) if source != number}
        for word in [*dict(self.weights), *(word for word, _ in self.cross_replace_steps if word is not None)]:
            if not any(target.contains(word) for target in targets.values()):
                raise ValueError(
                    f"the word {word!r} is in none of the target prompts {[target.text for target in targets.values()]}"
                )
        self._normalise(_targets=self._aligned(prompts))

    def _aligned(self, prompts: Sequence[TokenizedPrompt | JointPrompt]) -> Mapping[int, TargetColumns]:
        """By number of the prompt, the columns of each target whose words stand where these prompts have them."""
        return {
            number: TargetColumns(
                prompts[number],
                aligned(_ALIGN[self.align], prompts[source], prompts[number], self.compat),
                self.cross_replace_steps,
                dict(self.weights),
                self.compat,
            )
            for number, source in enumerate(self._sources)
            if source != number
        }

    def encoded(self, encoding: Encoding) -> PromptToPromptEdit:
        """The edit for what the pipeline encodes."""
        if encoding.prompts is None:
            return self
        known = tokenize_prompts(self.prompts, self.tokenizer)
        placed = encoded_prompts(encoding, known)
        if placed == tuple(known):
            return self
        moved = copy.copy(self)
        moved._normalise(_targets=self._aligned(placed))
        return moved

    def active(self, step: Step) -> bool:
        return self._replaces_self(step) or self._replaces_cross(step)

    def windows(self) -> Windows:
        asked = []
        if self._window.stop > self._window.start and self.max_tokens != 0:
            asked.append((f"self_replace_steps={self.self_replace_steps}", self._replaces_self))
        if any(window.stop > window.start for _, window in self.cross_replace_steps):
            spelled = ", ".join(f"{word or 'all words'}: {(w.start, w.stop)}" for word, w in self.cross_replace_steps)
            asked.append((f"cross_replace_steps ({spelled})", self._replaces_cross))
        return tuple(asked)

    def _replaces_self(self, step: Step) -> bool:
        return self._window.holds(step, self.compat)

    def _replaces_cross(self, step: Step) -> bool:
        return any(any(target.replaced(step)) for target in self._targets.values())

    def written_for(self) -> tuple[str, ...]:
        """The prompts that it is written for, the source's first."""
        return tuple(self.prompts)

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        is_joint = any(site.is_joint for site in sites)
        chosen: set[Site] = set()
        if self.self_replace_steps[1] > self.self_replace_steps[0]:
            chosen |= set(self.joint_sites(sites) if is_joint else super().select(sites))
        if any(window.stop > window.start for _, window in self.cross_replace_steps):
            chosen |= set(LayerSelection.parse("joint" if is_joint else "cross").match(sites))
        return tuple(site for site in sites if site in chosen)

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        deepest = max((site.level for site in sites), default=2)
        return LayerSelection.parse("self", levels=range(min(2, deepest), deepest + 1)).match(sites, by_default=True)

    def phase(self, step: Step) -> Hashable:
        return self._replaces_self(step), tuple(target.replaced(step) for target in self._targets.values())

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, AnyProduct | Sequence[AnyProduct]]:
        if site.kind == "self":
            return {t: Product(s, (s,), (t,)) for s, t in roles.pairs()} if self._replaces_self(step) else {}
        replaces_image = site.is_joint and self._replaces_self(step) and self._selection("joint").selects(site)
        products: dict[int, Sequence[AnyProduct]] = {}
        for source, target in roles.pairs():
            terms: Sequence[AnyProduct]
            if site.is_joint:
                terms = self.blocks(source, target, step, roles, replaces_image, site.kind == "joint")
            else:
                terms = self._columns(source, target, roles).products(source, target, step)
            if terms:
                products[target] = terms
        return products

    def blocks(
        self, source: int, target: int, step: Step, roles: BatchRoles, image: bool, text: bool
    ) -> tuple[JointProduct, ...]:
        """A target row of joint attention; () where it keeps its own map.

        Args:
            source, target: rows of the batch.
            step, roles: of the call.
            image: whether the block of its map over image keys is the source's.
            text: whether columns of words are replaced that are to be at the step.
        """
        columns = self._columns(source, target, roles)
        return block_products(source, target, image, columns.mixings(step) if text else (None, None))

    def _columns(self, source: int, target: int, roles: BatchRoles) -> TargetColumns:
        number = roles.prompt_of(target)
        if number not in self._targets or self._sources[number] != roles.prompt_of(source):
            raise ValueError(
                f"the batch edits prompt {number} from prompt {roles.prompt_of(source)}, which is not how the edit "
                f"aligned its {len(self.prompts)} prompts: give it the pipeline call's prompts, in their order, "
                "and the session's source_of"
            )
        return self._targets[number]

    @property
    def _sources(self) -> tuple[int, ...]:
        return tuple(self.source_of or ())

    @property
    def _window(self) -> StepWindow:
        return StepWindow(*self.self_replace_steps)


def tokenize_prompts(prompts: Any, tokenizer: Any) -> list[TokenizedPrompt]:
    """A pipeline call's prompts, as the text encoder sees them; TypeError where one is no text."""
    if isinstance(prompts, str):
        raise TypeError(f"expected a list of prompts, the source's first, got the text {prompts!r}")
    prompts = list(prompts)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be text, got {type(prompt).__name__}: {prompt!r}")
    return [tokenize(prompt, tokenizer) for prompt in prompts]


def _word_windows(steps: Any) -> tuple[tuple[str | None, StepWindow], ...]:
    """(word, window) pairs, the default's first, whose word is None."""
    if not isinstance(steps, Mapping) and not _is_normalised(steps):
        return ((None, StepWindow.parse(steps)),)
    given = dict(steps)
    default = given.pop("default_", given.pop(None, (0.0, 1.0)))
    return ((None, StepWindow.parse(default)), *((word, StepWindow.parse(value)) for word, value in given.items()))


def _is_normalised(steps: Any) -> bool:
    return isinstance(steps, tuple) and all(isinstance(item, tuple) and len(item) == 2 for item in steps)


def _factors(weights: Any) -> tuple[tuple[str, float], ...]:
    expected = "expected weights={word: factor} with finite factors"
    try:
        factors = dict(weights)
    except (TypeError, ValueError):
        raise ValueError(f"{expected}, got {weights!r}: name the word of each factor") from None
    for word, factor in factors.items():
        if (
            not isinstance(word, str)
            or isinstance(factor, bool)
            or not isinstance(factor, Real)
            or not isfinite(factor)
        ):
            raise ValueError(f"{expected}, got {word!r}: {factor!r}")
    return tuple((word, float(factor)) for word, factor in factors.items())
