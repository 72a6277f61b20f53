"""Where concepts are in an image, whether its prompt says them or not: ConceptAttention, on transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..edits.selection import LayerSelection
from ..edits.watchers import Watcher, check_same_images
from ..models.adapters.adapter import ModelAdapter, identity
from ..models.adapters.families import adapter_of
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, StepWindow
from ..prompts.encoding import Encoding, EncodingHook, encoding_tokenizer
from ..prompts.joint_text import JointPrompt, encoded_prompts
from ..prompts.words import TokenizedPrompt, tokenize
from ..session.layers.joint_computing import JointLayer
from ..session.unedited import unedited
from ..texts import check_text
from .concept_stream import ConceptStream
from .views import overlay
from .watching import check_options, watching

__all__ = ["ConceptMaps", "concept_maps"]

#: Dual blocks of FLUX.1, and those of them that its authors read.
_FLUX_BLOCKS, _FLUX_LAYERS = 19, range(10, 18)


@contextmanager
def concept_maps(
    pipe: Any, concepts: Sequence[str], *, steps: Any = 1.0, layers: Any = None, **session_options: Any
) -> Iterator[ConceptMaps]:
    """Find concepts in the images of the pipeline calls in a ``with`` block, without their being in the prompt::

        with concept_maps(pipe, ["dog", "grass", "sky"]) as maps:
            image = pipe("a dog in a park").images[0]
        maps.overlay(maps.concept("dog"), image).save("dog.png")

    ConceptAttention: tokens of the concepts go through the transformer's dual blocks beside the prompt's, by the same
    weights. They attend to one another and to the image's tokens; image and text do not attend to them, so that the
    picture stays what it is, to rounding. A place's share of a concept is the softmax over the concepts of the products
    of what attention gives to the place with what it gives to each concept, averaged over layers and steps: at every
    place the concepts' shares add up to 1. No map over pairs of image tokens is made.

    Around and inside ``with editing(...)`` it reads what the edited layers give; images count in the order of the call,
    the source's first. A concept of several tokens is one token, the mean of what the text encoder (T5) gives for them.

    Args:
        pipe: a diffusers pipeline of Stable Diffusion 3 or FLUX.1, with a text encoder.
        concepts: two or more words or short phrases, which share out each place among themselves: name what else is in
            the picture, "background" among it.
        steps: a number s for the steps ``[0, int(T·s))``, or a pair.
        layers: module paths, beginnings of paths, or indices among the layers of joint attention, of dual blocks.
            Default: the authors' for FLUX.1, blocks 10 to 17; the latter half of the dual blocks of another model.
        **session_options: of :func:`editing`, such as ``images_per_prompt``; not inside a session, which has its own.

    Yields:
        `ConceptMaps`, which can be asked after a call.

    Raises:
        ValueError: fewer than two concepts, layers that match nothing or are of single blocks, or a pipeline without
            text encoder; before anything is denoised.
        TypeError: concepts that are no text, or a model without a stream of text tokens, such as a UNet.

    Reference: Helbling et al., "ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features", ICML
    2025, arXiv 2502.04320.
    """
    names = _checked(concepts)
    adapter = adapter_of(pipe)
    check_options(pipe, session_options)
    chosen = _chosen(adapter, layers)
    reader = _Concepts(adapter, names, _embedded(pipe, adapter, names), chosen, StepWindow.parse(steps))
    try:
        with watching(pipe, reader, **session_options):
            yield ConceptMaps(names, reader)
    finally:
        reader.remove()


class ConceptMaps:
    """Shares read by :func:`concept_maps`: arrays [height, width], float32, on the grid of the image's tokens."""

    def __init__(self, concepts: tuple[str, ...], reader: _Concepts) -> None:
        self.concepts, self._reader = concepts, reader

    def concept(self, concept: str, image: int = 0) -> np.ndarray:
        """The share that a concept has of each place, in [0, 1].

        Args:
            concept: as it was given to :func:`concept_maps`.
            image: index among the images of the call.
        """
        if concept not in self.concepts:
            raise ValueError(f"no share of {concept!r} was read; there is {list(self.concepts)}")
        share: np.ndarray = self._reader.shares(image)[self.concepts.index(concept)].float().cpu().numpy()
        return share

    def largest(self, image: int = 0) -> np.ndarray:
        """For each place the index of the concept that has the largest share of it [height, width], int64."""
        index: np.ndarray = self._reader.shares(image).argmax(0).cpu().numpy()
        return index

    def overlay(self, share: np.ndarray, image: Any, strength: float = 0.6) -> Image.Image:
        """The image (PIL, array or tensor) with a map laid over it, from transparent (its least) to red (its most)."""
        return overlay(share, image, strength)


class _Concepts(Watcher):
    """Follows the concepts through the blocks of each call, and sums the shares that places give them."""

    def __init__(
        self,
        adapter: ModelAdapter,
        names: tuple[str, ...],
        embeddings: torch.Tensor,
        layers: tuple[Site, ...],
        window: StepWindow,
    ) -> None:
        self._read, self._count = {site.path for site in layers}, len(names)
        self._last, self._window = max(site.index for site in layers), window
        self._rows: tuple[int, ...] = ()
        self._stream = ConceptStream(adapter.model, embeddings, lambda: self._rows)
        self._index = {path: n for n, path in enumerate(_dual_paths(adapter))}
        self.begin()

    def remove(self) -> None:
        """Take the hooks off the model's blocks."""
        self._stream.remove()

    def begin(self) -> None:
        """A new run starts: forget the last one's."""
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._images: tuple[tuple[int, int], ...] | None = None
        self._before = len(self._index)  # the block that was computed last

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(site for site in sites if site.path in self._index and site.index <= self._last)

    def observed(self, site: Site, step: Step, roles: BatchRoles) -> tuple[int, ...]:
        if step not in self._window or not roles.images:
            return ()
        self._images = check_same_images(self._images, roles)
        self._rows = roles.select(conditional=True)
        return self._rows

    def observe(self, site: Site, step: Step, roles: BatchRoles, layer: JointLayer, image: torch.Tensor) -> None:
        assert site.grid is not None
        index = self._index[site.path]
        if index <= self._before:  # the first that another call of the model computes
            self._stream.enter()
        self._before = index
        concepts = self._stream.attend(index, layer).detach()
        if site.path not in self._read:
            return
        wide = torch.promote_types(image.dtype, torch.float32)
        places = image[list(self._rows)].detach().transpose(1, 2).flatten(2)  # [rows, N, H·E]
        shares = (places.to(wide) @ concepts.to(wide).mT).softmax(-1)  # [rows, N, C]
        for row, share in zip(self._rows, shares, strict=True):
            which = roles.image_of(row)
            grid = share.T.reshape(self._count, *site.grid)
            self._sums[which] = grid if which not in self._sums else self._sums[which] + grid
            self._counts[which] = self._counts.get(which, 0) + 1

    def shares(self, image: int) -> torch.Tensor:
        """[C, height, width] of an image of the call, averaged over layers and steps."""
        if self._images is None:
            raise ValueError("no pipeline call was made inside the block, or none of its steps is in steps=: no maps")
        if not 0 <= image < len(self._images):
            raise ValueError(f"expected image to be in 0 to {len(self._images) - 1}, got {image}")
        which = self._images[image]
        return self._sums[which] / self._counts[which]


def _checked(concepts: Any) -> tuple[str, ...]:
    if isinstance(concepts, str) or not all(isinstance(name, str) for name in concepts):
        raise TypeError(f"expected a list of concepts, two words or more, got {concepts!r}")
    names = tuple(concepts)
    if len(set(names)) != len(names) or len(names) < 2 or not all(name.strip() for name in names):
        raise ValueError(
            f"expected two concepts or more, each once, among which every place is shared out, got {list(names)}: name "
            'what else is in the picture, such as "background"'
        )
    for name in names:
        check_text("a concept", name)
    return names


def _dual_paths(adapter: ModelAdapter) -> list[str]:
    """Paths of the layers of joint attention in dual blocks, in order."""
    return [site.path for site in adapter.sites if site.kind == "joint" and site.place == "dual"]


def _chosen(adapter: ModelAdapter, layers: Any) -> tuple[Site, ...]:
    """The layers that are read."""
    if adapter.family not in ("sd3", "flux"):
        raise TypeError(
            "concepts go along the stream of text tokens in dual blocks, which Stable Diffusion 3 and FLUX.1 have and "
            f"{type(identity(adapter.model)).__name__} is not known to: read words of the prompt with heat_maps"
        )
    dual = _dual_paths(adapter)
    joint = tuple(site for site in adapter.sites if site.kind == "joint")
    if layers is None:
        known = adapter.family == "flux" and len(dual) == _FLUX_BLOCKS
        read = _FLUX_LAYERS if known else range(len(dual) // 2, len(dual))
        return tuple(site for site in joint if site.path in dual and site.index in read)
    chosen = LayerSelection.parse("joint", layers=layers).match(joint)
    single = [site.path for site in chosen if site.path not in dual]
    if single:
        raise ValueError(
            f"concepts go along the stream of text tokens, and {', '.join(single)} has one stream for all tokens: name "
            f"layers of dual blocks, of which there are {len(dual)}"
        )
    return chosen


@torch.no_grad()
def _embedded(pipe: Any, adapter: ModelAdapter, names: tuple[str, ...]) -> torch.Tensor:
    """For each concept the mean embedding of its tokens [C, E], of the last text encoder that the pipeline has."""
    tokenizer = encoding_tokenizer(pipe)
    if adapter.pipe is None or tokenizer is None:
        raise ValueError("concepts are encoded by the pipeline: pass one with its text encoders and tokenizers")
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"{type(pipe).__name__} encodes prompts in its blocks, where concepts cannot be encoded: read them around "
            "an ordinary pipeline of the same parts, such as FreePromptPipeline.from_pipe(pipe)"
        )
    seen: list[Encoding] = []
    hook = EncodingHook(pipe, seen.append, adapter.text_parts)
    try:
        with unedited(pipe):
            further = {"prompt_3": None, "do_classifier_free_guidance": False} if adapter.family == "sd3" else {}
            embeddings = pipe.encode_prompt(prompt=list(names), prompt_2=None, **further)[0]
    finally:
        hook.remove()
    known = [tokenize(name, tokenizer) for name in names]
    out = []
    for prompt, given in zip(encoded_prompts(seen[0], known), embeddings, strict=True):
        assert isinstance(prompt, JointPrompt)
        start, own = 0, []
        for part in prompt.parts:
            if isinstance(part, TokenizedPrompt):
                own = [start + part.first + place for place, span in enumerate(part.spans) if span is not None]
            start += part.length if isinstance(part, TokenizedPrompt) else part
        out.append(given[own].mean(0))
    return torch.stack(out)
