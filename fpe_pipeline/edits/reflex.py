"""ReFlex: blocks of a transformer's attention map after the softmax, taken from the source."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from ..prompts.encoding import Encoding
from .base import Windows
from .joint_attention import JointAttentionEdit, flux_layers
from .joint_products import JointProduct
from .prompt_to_prompt import PromptToPromptEdit
from .selection import LayerSelection, whole_numbers

__all__ = ["ReFlexEdit"]

# Numbers among all blocks of FLUX.1, of which the first 19 are dual.
_TEXT_LAYERS, _IMAGE_LAYERS = range(13, 45), range(20, 45)


@dataclass(frozen=True)
class ReFlexEdit(JointAttentionEdit):
    """ReFlex: what a target's image looks at, after the softmax, is what its source's looks at.

    The map of image queries has two blocks, over image keys and over text keys, whose rows together sum to 1. The first
    is the source's, and of the second the columns of words that both prompts have, as in Prompt-to-Prompt; text queries
    keep their own map. The authors also hand features of blocks 13 to 19 on to the target, which this does not.

    Args:
        prompts: the source prompt and its targets, in the order of the pipeline call.
        tokenizer: the pipeline's.
        align: ``"refine"`` pairs the words that the prompts have in common, ``"replace"`` words by their place.
        text_steps: so many steps, from the first, have the columns of words replaced.
        image_steps: so many steps, from the first, have the block over image keys replaced.
        text_layers: module paths, beginnings of paths, or indices among the layers of joint attention. Default: the
            authors' for FLUX.1, blocks 13 to 44.
        image_layers: the same for the block over image keys. Default: the authors' for FLUX.1, blocks 20 to 44.
        layers: for both blocks, in the stead of the two.
        topk: 1, where the whole block is the source's. More entries of a row than that would be the target's by their
            rank in the source's map: which they are is not known without the map itself, and it is refused.
        source_of: for each prompt, the index of its source; default: all from prompt 0. As the session's.

    Raises:
        ValueError: prompts that do not align, ``topk`` above 1; in a session, a UNet, layers that match nothing, or
            none named for a transformer that is not FLUX.1.
        TypeError: prompts that are no list of text, or no tokenizer.

    Reference: Kim et al., "ReFlex: Text-Guided Editing of Real Images in Rectified Flow via Mid-Step Feature Extraction
    and Attention Adaptation", ICCV 2025, arXiv 2507.01496.
    """

    prompts: Sequence[str]
    tokenizer: Any = field(repr=False, compare=False)
    align: Literal["replace", "refine"] = "refine"
    text_steps: int = field(default=10, kw_only=True)
    image_steps: int = field(default=7, kw_only=True)
    text_layers: str | int | Iterable[str | int] | None = field(default=None, kw_only=True)
    image_layers: str | int | Iterable[str | int] | None = field(default=None, kw_only=True)
    topk: int = field(default=1, kw_only=True)
    source_of: Sequence[int] | None = field(default=None, kw_only=True)
    _words: PromptToPromptEdit = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = {name: whole_numbers(name, [getattr(self, name)])[0] for name in ("text_steps", "image_steps", "topk")}
        if counts["topk"] > 1:
            raise ValueError(
                f"topk={self.topk} keeps the target's entries by their rank in each row of the source's map, which is "
                "not known of a map that is never made: leave it out, which takes the whole block"
            )
        if self.layers is not None and (self.text_layers is not None or self.image_layers is not None):
            raise ValueError("layers= is for both blocks: leave out text_layers and image_layers")
        words = PromptToPromptEdit(self.prompts, self.tokenizer, self.align, 1.0, 0, source_of=self.source_of)
        self._normalise(
            **counts,
            prompts=words.prompts,
            text_layers=LayerSelection.parse("joint", layers=self.text_layers).layers,
            image_layers=LayerSelection.parse("joint", layers=self.image_layers).layers,
            source_of=words.source_of,
            _words=words,
        )

    def active(self, step: Step) -> bool:
        return step.index < max(self.text_steps, self.image_steps)

    def windows(self) -> Windows:
        counts = {"text_steps": self.text_steps, "image_steps": self.image_steps}
        return tuple(
            (f"{name}={count}", lambda step, count=count: step.index < count) for name, count in counts.items() if count
        )

    def phase(self, step: Step) -> Hashable:
        return step.index < self.text_steps, step.index < self.image_steps

    def written_for(self) -> tuple[str, ...]:
        """The prompts that it is written for, the source's first."""
        return tuple(self.prompts)

    def encoded(self, encoding: Encoding) -> ReFlexEdit:
        """The edit for what the pipeline encodes."""
        words = self._words.encoded(encoding)
        if words is self._words:
            return self
        moved = copy.copy(self)
        moved._normalise(_words=words)
        return moved

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        chosen = {*self._block_sites("text", sites)} if self.text_steps else set()
        chosen |= {*self._block_sites("image", sites)} if self.image_steps else set()
        return tuple(site for site in sites if site in chosen)

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Sequence[JointProduct]]:
        with_text = step.index < self.text_steps and self._acts_on("text", site)
        with_image = step.index < self.image_steps and self._acts_on("image", site)
        products = {}
        for source, target in roles.pairs():
            terms = self._words.blocks(source, target, step, roles, with_image, with_text)
            if terms:
                products[target] = terms
        return products

    def _block_sites(self, block: Literal["text", "image"], sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The layers in which a block is replaced."""
        named = self.text_layers if block == "text" else self.image_layers
        if named is not None:
            return LayerSelection.parse("joint", layers=named).match(sites)
        return flux_layers("ReFlex", _TEXT_LAYERS if block == "text" else _IMAGE_LAYERS, sites)

    def _acts_on(self, block: Literal["text", "image"], site: Site) -> bool:
        if self.layers is not None:
            return True
        named = self.text_layers if block == "text" else self.image_layers
        default = tuple(_TEXT_LAYERS if block == "text" else _IMAGE_LAYERS)
        return LayerSelection.parse("joint", layers=default if named is None else named).selects(site)
