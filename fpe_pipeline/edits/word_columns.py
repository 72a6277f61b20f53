"""Prompt-to-Prompt's columns of a target: which of its words' columns are the source's at a step, with what factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..models.steps import Step, StepWindow
from ..prompts.alignment import Alignment
from ..prompts.joint_text import JointPrompt
from ..prompts.words import TokenizedPrompt
from .joint_products import JointProduct, SegmentRows
from .products import Product

__all__ = ["Mixings", "TargetColumns", "block_products"]

#: Of the values that the source's map is applied to, and of those of the target's own; None for nothing.
Mixings = tuple[torch.Tensor | None, torch.Tensor | None]


class TargetColumns:
    """One target's columns: which of them are the source's at a step, and with what factor."""

    def __init__(
        self,
        prompt: TokenizedPrompt | JointPrompt,
        alignment: Alignment,
        windows: Sequence[tuple[str | None, StepWindow]],
        weights: Mapping[str, float],
        compat: str | None,
    ) -> None:
        self._alignment, self._compat = alignment, compat
        # The window of all tokens, then those of words, which go before it.
        self._windows = [
            (slice(None) if word is None else list(prompt.find(word)), window)
            for word, window in windows
            if word is None or prompt.contains(word)
        ]
        self._factors = torch.ones(prompt.length, dtype=torch.float64)
        for word, factor in weights.items():
            if prompt.contains(word):
                self._factors[list(prompt.find(word))] = factor
        self._mixings: dict[tuple[bool, ...], Mixings] = {}

    def replaced(self, step: Step) -> tuple[bool, ...]:
        """For each window, whether the step is in it."""
        return tuple(step.place(self._compat) in window.steps(step.total + 1) for _, window in self._windows)

    def mixings(self, step: Step) -> Mixings:
        """What text values are multiplied with for the source's map, and for the target's own.

        (None, None) where the target keeps its own map.
        """
        replaced = self.replaced(step)
        if replaced not in self._mixings:
            self._mixings[replaced] = self._mix(replaced)
        return self._mixings[replaced]

    def products(self, source: int, target: int, step: Step) -> tuple[Product, ...]:
        """The target row's products in cross-attention; none where it keeps its own map."""
        of_source, of_target = self.mixings(step)
        if of_source is None:
            return ()
        replaced_columns = Product(source, (source,), (target,), mixing=of_source)
        if of_target is None:
            return (replaced_columns,)
        return replaced_columns, Product(target, (target,), (target,), mixing=of_target)

    def _mix(self, replaced: tuple[bool, ...]) -> Mixings:
        alpha = torch.zeros_like(self._factors)
        for (tokens, _), on in zip(self._windows, replaced, strict=True):
            alpha[tokens] = float(on)
        if not alpha.any():
            return None, None
        kept, factors = self._alignment.kept, self._factors
        own = (1 - kept) * factors * alpha + (1 - alpha)
        return self._alignment.mapper * (kept * factors * alpha), torch.diag(own) if own.any() else None


def block_products(source: int, target: int, replaces_image: bool, mixings: Mixings) -> tuple[JointProduct, ...]:
    """A target row of joint attention whose image queries take blocks of the source's map, after the softmax.

    The map of image queries is two blocks, over image keys and over text keys. Text queries keep their own map, and so
    does what attends to a reference picture (FLUX.1 Kontext), of which the rule says nothing.

    Args:
        source, target: rows of the batch.
        replaces_image: whether the block over image keys is the source's.
        mixings: of the text's values, for the source's block over text keys and for the target's own; (None, None)
            where that block is the target's own.

    Returns:
        The row's terms; () where it keeps its own map.
    """
    of_source, of_target = mixings
    if not replaces_image and of_source is None:
        return ()
    rest = target if of_source is None or of_target is not None else None
    terms = [JointProduct.own(target, outputs="text")]
    for row, image, text, mixing, reference in (
        (source, target if replaces_image else None, None if of_source is None else target, of_source, None),
        (target, None if replaces_image else target, rest, of_target, target),
    ):
        if image is not None or text is not None or reference is not None:
            own, values = SegmentRows(row, row), SegmentRows(image, text)
            terms.append(JointProduct(own, own, values, mixing=mixing, outputs="image", reference=reference))
    return tuple(terms)
