"""Plug-and-Play diffusion features."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, StepWindow
from .base import Features, Windows
from .products import Product
from .self_attention import SelfAttentionEdit

__all__ = ["PlugAndPlayEdit"]


@dataclass(frozen=True)
class PlugAndPlayEdit(SelfAttentionEdit):
    """Plug-and-Play: decoder self-attention maps and features of one residual block are the source's.

    As algebra, ``A_source @ v_target`` in both halves of the batch; beside it, the residual branch of one block. With
    a pipeline's batch [u_source, u_target, source, target] each half takes from its own source; the original's batch
    of three rows, whose source sees an empty prompt, is written down with :class:`BatchRoles`::

        BatchRoles(conditional=(True, False, True), source_of=(0, 0, 0))    # [source, unconditional, conditional]

    Args:
        attention_steps: a number a for the steps ``[0, int(T·a))``, or a pair, in which maps are injected.
        feature_steps: the same for features.
        feature_modules: paths of the modules whose output is injected. A residual block's last convolution leaves its
            skip connection out, as in the original.
        levels, max_tokens, layers: at most one, in place of the default layers, which are all self-attention layers
            of the decoder but those of its first attention module; see :class:`FreePromptEdit`.

    Reference: Tumanyan et al., "Plug-and-Play Diffusion Features for Text-Driven Image-to-Image Translation",
    CVPR 2023.
    """

    attention_steps: Any = 0.5
    feature_steps: Any = 0.8
    feature_modules: Any = field(default=("up_blocks.1.resnets.1.conv2",), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        modules = self.feature_modules
        self._normalise(
            attention_steps=StepWindow.parse(self.attention_steps),
            feature_steps=StepWindow.parse(self.feature_steps),
            feature_modules=(modules,) if isinstance(modules, str) else tuple(modules),
        )

    def active(self, step: Step) -> bool:
        return step in StepWindow(*self.attention_steps) or step in StepWindow(*self.feature_steps)

    def windows(self) -> Windows:
        names = ("attention_steps", "feature_steps") if self.max_tokens != 0 else ("feature_steps",)
        asked = []
        for name in names:
            window = StepWindow(*getattr(self, name))
            if window.stop > window.start and (name != "feature_steps" or self.feature_modules):
                asked.append((f"{name}={getattr(self, name)}", window.holds))
        return tuple(asked)

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        decoder = [site for site in sites if site.kind == "self" and site.place == "up"]
        first = decoder[0].path.split(".transformer_blocks")[0] if decoder else ""
        chosen = tuple(site for site in decoder if not site.path.startswith(f"{first}."))
        if not chosen:
            raise ValueError(
                "the UNet's decoder has no self-attention layer after its first attention module: name layers="
            )
        return chosen

    def phase(self, step: Step) -> Hashable:
        return step in StepWindow(*self.attention_steps), step in StepWindow(*self.feature_steps)

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product]:
        if step not in StepWindow(*self.attention_steps):
            return {}
        return {t: Product(query=s, keys=(s,), values=(t,)) for s, t in roles.pairs(conditional=None)}

    def features(self, step: Step, roles: BatchRoles) -> Features:
        """The rows whose output is another row's, by module."""
        if step not in StepWindow(*self.feature_steps):
            return {}
        rows = {target: source for source, target in roles.pairs(conditional=None)}
        return dict.fromkeys(self.feature_modules, rows)
