"""Noise that all prompts of an edit share, at the start and in every step of a stochastic sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

__all__ = ["InTurn", "are_paired", "level", "paired_generators", "row_generators", "shared_latents"]


def shared_latents(
    latents: torch.Tensor | None, prompts: int, images: int, channels: int, tokens: int | None = None
) -> torch.Tensor | None:
    """Reduce starting latents to one row an image, [images, C, h, w].

    Args:
        latents: [1, C, h, w], [images, C, h, w] or [prompts · images, C, h, w], prompt by prompt; or None.
        prompts: source and targets.
        images: images per prompt.
        channels: C of the model.
        tokens: N, of latents that are packed into tokens: [rows, N, C] in the place of [rows, C, h, w].

    Raises:
        ValueError: another shape, or rows of one image that differ between prompts.
    """
    if latents is None:
        return None
    rest = f"{channels}, h, w" if tokens is None else f"{tokens}, {channels}"
    shapes = " or ".join(f"[{rows}, {rest}]" for rows in dict.fromkeys((1, images, prompts * images)))
    if tokens is None:
        fits = latents.ndim == 4 and latents.shape[1] == channels
    else:
        fits = latents.shape[1:] == (tokens, channels)
    if not fits or latents.shape[0] not in (1, images, prompts * images):
        raise ValueError(f"expected latents {shapes}, got {list(latents.shape)}")
    if latents.shape[0] == 1:
        return latents.expand(images, *latents.shape[1:])
    for row in range(images, latents.shape[0]):
        if not torch.equal(latents[row], latents[row % images]):
            raise ValueError(
                f"an edit starts from shared noise, but row {row} of latents differs from the source's row "
                f"{row % images}; pass latents {shapes.split(' or ')[0]}"
            )
    return latents[:images]


def row_generators(
    generator: torch.Generator | list[torch.Generator] | None, prompts: int, images: int
) -> list[torch.Generator]:
    """One generator a row, prompt by prompt, such that rows of the same image draw the same noise.

    The last prompt's rows hold the caller's own generators, where there is one for each image: they advance as
    they would in diffusers. Several images from one generator, or from none, get generators seeded from it.
    """
    own = _own_generators(generator, images)
    copies = [_copy(each) for _ in range(prompts - 1) for each in own]
    return copies + own


def paired_generators(
    generator: torch.Generator | None, source_of: Sequence[int], images: int
) -> list[torch.Generator]:
    """One generator a row, prompt by prompt, such that image i of a prompt draws what image i of its source draws.

    Args:
        generator: the caller's; with one source and one image it is the last row's, and advances as it would have.
        source_of: for each prompt, the index of its source.
        images: images a prompt.
    """
    sources = list(dict.fromkeys(source_of))
    own = _own_generators(generator, len(sources) * images)
    rows = [own[sources.index(source) * images + image] for source in source_of for image in range(images)]
    last = {id(each): row for row, each in enumerate(rows)}
    return [each if last[id(each)] == row else _copy(each) for row, each in enumerate(rows)]


def are_paired(
    generators: Sequence[torch.Generator],
    source_of: Sequence[int],
    images: int,
    states: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> bool:
    """Whether generators, one a row, give rows of one image the same noise: others, in the same state.

    Args:
        generators: of the rows.
        source_of: for each prompt, the index of its source.
        images: images a prompt.
        states: by id, those of some of them that are meant in the place of their present ones.
    """
    rows = [(source, image) for source in source_of for image in range(images)]
    if not len({id(each) for each in generators}) == len(generators) == len(rows):
        return False
    known: dict[tuple[int, int], torch.Tensor] = {}
    found = [states[id(each)] if id(each) in states else each.get_state() for each in generators]
    return all(torch.equal(state, known.setdefault(row, state)) for row, state in zip(rows, found, strict=True))


def level(generators: Sequence[torch.Generator], source_of: Sequence[int], images: int) -> None:
    """Bring generators that :func:`paired_generators` made to where the last row's of the same image is.

    That is the caller's own where there is one source and one image, from which a pipeline may draw in between, as
    where it encodes the picture under a mask.
    """
    rows = [(source, image) for source in source_of for image in range(images)]
    last = dict(zip(rows, generators, strict=True))
    for row, generator in zip(rows, generators, strict=True):
        if generator is not last[row]:
            generator.set_state(last[row].get_state())


class InTurn:
    """A caller's generators, one a row, which follow the first one of the same image.

    Pipelines that are given one picture for all rows encode it by the first row's alone, or by each row's in turn.

    Args:
        generators: of the rows.
        source_of: for each prompt, the index of its source.
        images: images a prompt.
    """

    def __init__(self, generators: Sequence[torch.Generator], source_of: Sequence[int], images: int) -> None:
        rows = [(source, image) for source in source_of for image in range(images)]
        first = dict(reversed(list(zip(rows, generators, strict=True))))
        self._first = {id(each): first[row] for row, each in zip(rows, generators, strict=True)}
        self._generators = generators
        self._before: dict[int, list[torch.Tensor]] = {}  # by a first one, the states in which it drew pictures
        self._drawn: dict[int, int] = {}  # by each one, pictures

    def level(self) -> None:
        """Bring all to where the first one of the same image is."""
        for each in self._generators:
            first = self._first[id(each)]
            if first is not each:
                each.set_state(first.get_state())

    def draw(self, sample: Callable[[Any], torch.Tensor], generator: Any = None) -> torch.Tensor:
        """A sample of a picture, the same noise for rows of one image however many of them it is drawn for."""
        first = self._first.get(id(generator))
        if first is not None:
            before, drawn = self._before.setdefault(id(first), []), self._drawn.get(id(generator), 0)
            if first is generator:
                before.append(generator.get_state())
            elif drawn < len(before):
                generator.set_state(before[drawn])
            self._drawn[id(generator)] = drawn + 1
        made = sample(generator)
        self.level()
        return made


def _own_generators(generator: torch.Generator | list[torch.Generator] | None, count: int) -> list[torch.Generator]:
    if isinstance(generator, torch.Generator) and count == 1:
        return [generator]
    if isinstance(generator, list):
        return list(generator)
    device = generator.device if generator is not None else torch.device("cpu")
    seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _copy(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy
