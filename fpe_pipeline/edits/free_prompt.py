"""Free-Prompt-Editing: replaced self-attention maps, wholly, softly or in a region."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, StepWindow
from ..prompts.encoding import Encoding
from .base import Windows, check_compat
from .joint_products import JointProduct, SegmentRows
from .masks import MaskImage, RunningWordMask, Shares, Strength, WordMask
from .products import Product
from .selection import LayerSelection, truth_value
from .self_attention import SelfAttentionEdit
from .watchers import Watcher

__all__ = ["JOINT_STEPS", "FreePromptEdit"]

#: The share of the steps in which Shin et al. replace maps of joint attention, where nothing else is said.
JOINT_STEPS = 0.2


@dataclass(frozen=True)
class FreePromptEdit(SelfAttentionEdit):
    """Free-Prompt-Editing: in self-attention layers, a target's attention map is its source's.

    As algebra, ``A_source @ v_target`` for the target rows of the conditional half; cross-attention and the
    unconditional half stay as they are. With a strength or a mask it is the blend
    ``α ⊙ (A_source @ v_target) + (1 - α) ⊙ (A_target @ v_target)``, whose rows still sum to 1.

    A transformer's layers (Stable Diffusion 3, FLUX) attend to image and text tokens under one softmax. There the
    queries and keys of a target's *image* tokens are its source's, and everything of its text stays its own: the layout
    is the source's, and what the words say is not. Layers of image tokens alone (``attn2``) are edited where they are
    named.

    Args:
        self_replace_steps: a number s for the steps ``[0, int(T·s))``, or a pair for ``[int(T·a), int(T·b))``.
        strength: α, a number in [0, 1]; or a sequence of numbers spread over the replaced steps, with straight lines
            between them; or a mapping from level to either (1 at other levels); or a function ``(site, step) -> α``.
        mask: where α applies, a factor of ``strength`` for each pixel: a picture's path, a PIL image or an array of
            the image's proportions, white where the source's map is taken (a token takes the mean over its part of the
            image); or a :class:`WordMask`.
        scope: of a transformer, ``"image"`` for the rule above, or ``"joint"`` for the source's whole map, by which a
            target also attends to words as its source does. Default: "image".
        both_halves: replace in the unconditional half as well.
        compat: ``"original"`` counts calls of the model rather than steps, as the authors' code does: with PNDM, whose
            first step calls it twice, the window ends a step earlier.
        levels: how often the replaced layers' input is downsampled from the latent: an int or several. Default:
            all levels from 1 on, which is what the method's limit of 32² tokens means at 512 px; all layers of a
            transformer, which has one level.
        max_tokens: replace layers of at most so many tokens, as the original does (32², at any image size).
        layers: module paths, beginnings of paths, or indices among the self-attention layers.

    References: Liu et al., "Towards Understanding Cross and Self-Attention in Stable Diffusion for Text-Guided
    Image Editing", CVPR 2024; for transformers Shin et al., arXiv 2508.07519 (ICCV 2025), who replace in the first
    fifth of the steps: ``FreePromptEdit(0.2)``.
    """

    self_replace_steps: Any = 0.8
    strength: Any = field(default=1.0, kw_only=True)
    mask: Any = field(default=None, kw_only=True)
    scope: Literal["image", "joint"] | None = field(default=None, kw_only=True)
    both_halves: bool = field(default=False, kw_only=True)
    compat: Literal["original"] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_compat(self.compat)
        if self.scope not in (None, "image", "joint"):
            raise ValueError(f'expected scope to be "image" or "joint", got {self.scope!r}')
        window, strength = StepWindow.parse(self.self_replace_steps), Strength.parse(self.strength)
        both = truth_value(self.both_halves, "both_halves")
        self._normalise(self_replace_steps=window, strength=strength, both_halves=both)
        if self.mask is not None and not isinstance(self.mask, MaskImage | WordMask | RunningWordMask):
            self._normalise(mask=MaskImage(self.mask))

    @property
    def window(self) -> StepWindow:
        """The steps in which maps are replaced: ``edit.window.steps(total)`` is a range."""
        return StepWindow(*self.self_replace_steps)

    @property
    def is_plain(self) -> bool:
        """Whether maps are replaced wholly and everywhere."""
        whole = self.mask is None and self.strength == Strength() and self.compat is None
        return whole and self.scope is None and not self.both_halves

    def active(self, step: Step) -> bool:
        return self.window.holds(step, self.compat)

    def windows(self) -> Windows:
        window = self.window
        if window.stop == window.start or self.strength == Strength.parse(0.0) or self.max_tokens == 0:
            return ()
        return ((f"self_replace_steps={self.self_replace_steps}", self.active),)

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        if not any(site.is_joint for site in sites):
            if self.scope is not None:
                raise ValueError(
                    f"scope={self.scope!r} says which tokens of joint attention are replaced, and a UNet has layers of "
                    "image tokens alone: leave it out"
                )
            return super().select(sites)
        return self.joint_sites(sites)

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        if sites and all(site.place in ("dual", "single") for site in sites):  # a transformer's, all of one level
            return LayerSelection.parse("self").match(sites)
        deepest = max((site.level for site in sites), default=1)
        return LayerSelection.parse("self", levels=range(1, max(deepest, 1) + 1)).match(sites, by_default=True)

    def written_for(self) -> tuple[str, ...]:
        """The prompts that it is written for, the source's first."""
        return (self.mask.prompt,) if isinstance(self.mask, WordMask) else ()

    def encoded(self, encoding: Encoding) -> FreePromptEdit:
        """The edit for what the pipeline encodes."""
        return self  # a mask's watcher places its word

    def begin(self) -> FreePromptEdit:
        """What a session asks for the length of its ``with`` block."""
        return replace(self, mask=self.mask.begin()) if isinstance(self.mask, WordMask) else self

    def watchers(self) -> tuple[Watcher, ...]:
        """What follows the run for it."""
        return (self.mask.collector,) if isinstance(self.mask, RunningWordMask) else ()

    def phase(self, step: Step) -> Hashable:
        return () if self.strength.is_constant and isinstance(self.mask, MaskImage | None) else None

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Any]:
        strength = self.strength.at(site, step, self.window, self.compat)
        products: dict[int, Any] = {}
        for source, target in roles.pairs(conditional=None if self.both_halves else True):
            weight, rest = self._shares(strength, site, roles, source)
            if isinstance(weight, float) and weight == 0.0:
                continue
            replaced, own = self._terms(site, source, target)
            if isinstance(weight, float) and weight == 1.0:
                products[target] = replaced
            else:
                products[target] = replace(replaced, weight=weight), replace(own, weight=rest)
        return products

    def _terms(self, site: Site, source: int, target: int) -> tuple[Product, Product] | tuple[JointProduct, ...]:
        """A target's row with its source's map, and as it is."""
        if not site.is_joint:
            return Product(source, (source,), (target,)), Product(target, (target,), (target,))
        rows = SegmentRows(source, source if self.scope == "joint" else target)
        return JointProduct(rows, rows, SegmentRows(target, target)), JointProduct.own(target)

    def _shares(self, strength: float, site: Site, roles: BatchRoles, source: int) -> Shares:
        if self.mask is None:
            return strength, 1.0 - strength
        mask = self.mask.begin() if isinstance(self.mask, WordMask) else self.mask
        return mask.shares(strength, site, roles, source)
