"""Where words act, what a pixel attends to, and the principal parts of self-attention: maps of any pipeline call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from fpe_kernels import LinearMap

from ..edits.masks import text_sites
from ..edits.selection import LayerSelection, whole_numbers
from ..edits.watchers import HeatCollector, Watcher, check_one_frame, check_same_images, resize_maps
from ..models.adapters.families import adapter_of
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, StepWindow
from ..prompts.encoding import Encoding, encoding_tokenizer
from ..prompts.joint_text import JointPrompt, encoded_prompts
from ..prompts.words import TokenizedPrompt, tokenize
from .views import check_components, overlay, principal_components
from .watching import check_options, watching

__all__ = ["HeatMaps", "heat_maps"]


@contextmanager
def heat_maps(
    pipe: Any,
    words: str | Sequence[str] = (),
    *,
    pixels: Iterable[Sequence[float]] = (),
    components: int = 0,
    steps: Any = 1.0,
    levels: Any = None,
    prompts: str | Sequence[str] | None = None,
    max_bytes: int = 512 << 20,
    **session_options: Any,
) -> Iterator[HeatMaps]:
    """Read attention maps of the pipeline calls in a ``with`` block; pictures stay what they are, to rounding::

        with heat_maps(pipe, ["cat"], pixels=[(256, 300)]) as maps:
            image = pipe("a cat on a chair").images[0]
        maps.overlay(maps.word("cat"), image).save("cat.png")

    Inside and around ``with editing(...)``, and around an edit by `FreePromptPipeline`, it reads the edited maps;
    images count in the order of the call, the source's first. Rows are the conditional ones. Maps are averaged over
    heads, layers and steps; no dense map is made: words are columns that the layers' products carry along, a pixel is
    one row of each map, and components come from products with the maps and their adjoints.

    Args:
        pipe: a diffusers pipeline with a UNet, or with a transformer that has an adapter, of which words are read: the
            columns of image queries over text keys, of every text encoder that has the word.
        words: a word or phrase, or several, each of which one of the prompts has to hold.
        pixels: points (x, y) of the image, in pixels, whose self-attention is read; of a UNet.
        components: number of principal components of self-attention, of a UNet. Queries and keys are kept for it.
        steps: a number s for the steps ``[0, int(T·s))``, or a pair.
        levels: levels of the layers that are read. Default: all layers of cross-attention for words; level 2, or the
            deepest there is, of self-attention for pixels and components.
        prompts: the pipeline call's. Default: read when the pipeline encodes them.
        max_bytes: limit of what ``components`` keeps.
        **session_options: of :func:`editing`, such as ``images_per_prompt``; not inside a session, which has its own.

    Yields:
        `HeatMaps`, which can be asked after a call.

    Raises:
        TypeError: words that are not text.
        ValueError: nothing to read, words that no prompt holds (before any denoising), pixels outside the image, more
            components than the layers have tokens, more to keep than ``max_bytes``.
    """
    words = (words,) if isinstance(words, str) else tuple(words)
    if not all(isinstance(word, str) for word in words):
        raise TypeError(f"expected words as text, got {', '.join(map(repr, words))}")
    points = tuple(_point(pixel) for pixel in pixels)
    (components,) = whole_numbers("components", [components])
    if not words and not points and not components:
        raise ValueError("expected words, pixels or components to read, got none of them")
    maps = HeatMaps(pipe, words, points, components, StepWindow.parse(steps), levels, max_bytes)
    check_options(pipe, session_options)
    if words and (refused := adapter_of(pipe).words_refused):
        raise ValueError(refused)
    if words and maps._tokenizer is None:
        raise ValueError(f"{type(pipe).__name__} has no tokenizer to find words with")
    if words and prompts is not None:
        maps._watcher.set_prompts([prompts] if isinstance(prompts, str) else list(prompts))
    with watching(pipe, maps._watcher, **session_options):
        yield maps


class HeatMaps:
    """Maps read by :func:`heat_maps`: arrays [height, width], float32, on the grid of the finest layer read."""

    def __init__(
        self,
        pipe: Any,
        words: tuple[str, ...],
        pixels: tuple[tuple[float, float], ...],
        components: int,
        window: StepWindow,
        levels: Any,
        max_bytes: int,
    ) -> None:
        self.words, self.pixels, self.components = words, pixels, components
        self._tokenizer = encoding_tokenizer(pipe)
        self._watcher = _Reader(self, window, levels, max_bytes, int(getattr(pipe, "vae_scale_factor", 8)))

    def words_of(self, image: int = 0) -> tuple[str, ...]:
        """The words that were read of an image: of those that were asked for, the ones that its prompt has."""
        return self._watcher.present(self._watcher.prompt_of(image))

    def word(self, word: str, image: int = 0) -> np.ndarray:
        """The heat of a word: the share of attention that each place pays it.

        Args:
            word: as it was given to :func:`heat_maps`.
            image: index among the images of the call.
        """
        present = self.words_of(image)
        if word not in present:
            raise ValueError(f"no heat of {word!r} was read for image {image}; there is {list(present) or 'none'}")
        heat = self._watcher.words.heat(self._watcher.image(image)) if self._watcher.words else None
        if heat is None:
            raise ValueError("no step of the window has run: there is no heat")
        return _array(heat[present.index(word)])

    def pixel(self, point: Sequence[float], image: int = 0) -> np.ndarray:
        """What a point (x, y) of the image attends to in self-attention; sums to 1 over the grid.

        Where queries and keys were kept for ``components``, any point of the image may be asked for, after the call
        too; else those that were given to :func:`heat_maps`.
        """
        point = _point(point)
        if point in self.pixels:
            total = self._watcher.pixel_sum(image)[self.pixels.index(point)]
        elif self.components:
            total = self._watcher.kept_row(point, image)
        else:
            raise ValueError(f"the pixel {point} was not read; {list(self.pixels)} were")
        return _array(total / total.sum())

    def principal_components(self, image: int = 0) -> np.ndarray:
        """[components, height, width]: scores of the mean self-attention map's rows on its principal components.

        Places that attend alike score alike. The largest variance comes first; signs are such that the largest
        absolute score is positive.
        """
        kept, grid = self._watcher.kept(image)
        return _array(principal_components(kept, self.components).reshape(self.components, *grid))

    def overlay(self, heat: np.ndarray, image: Any, strength: float = 0.6) -> Image.Image:
        """The image (PIL, array or tensor) with a map laid over it, from transparent (its least) to red (its most)."""
        return overlay(heat, image, strength)


class _Reader(Watcher):
    """Collects words' columns, pixels' rows and whole operators."""

    def __init__(self, owner: HeatMaps, window: StepWindow, levels: Any, max_bytes: int, factor: int) -> None:
        self._owner, self._window, self._levels = owner, window, levels
        self._max_bytes, self._factor = max_bytes, factor
        self._words_of: list[tuple[str, ...]] = []
        self._prompts_are_given = self._text_was_run = self._text_is_new = False
        self.words: HeatCollector | None = None
        self.begin()

    def set_prompts(self, prompts: Sequence[str]) -> None:
        """What the rows' prompts are, whatever the pipeline encodes."""
        self._prompts_are_given = True
        self._set(prompts, [tokenize(prompt, self._owner._tokenizer) for prompt in prompts])

    def encoded(self, encoding: Encoding) -> None:
        if self._prompts_are_given or not self._owner.words:
            return
        if encoding.prompts is None:
            # Embeddings: of what was encoded before in this block, unless a call of its own has used that up.
            if self._text_was_run:
                self.words, self._words_of = None, []
            self._text_is_new = False
            return
        self._text_was_run, self._text_is_new = False, True
        known = [tokenize(prompt, self._owner._tokenizer) for prompt in encoding.prompts]
        self._set(encoding.prompts, encoded_prompts(encoding, known))

    def _set(self, prompts: Sequence[str], tokenized: Sequence[TokenizedPrompt | JointPrompt]) -> None:
        missing = [word for word in self._owner.words if not any(prompt.contains(word) for prompt in tokenized)]
        if missing:
            raise ValueError(f"the words {missing} are in none of the prompts {list(prompts)}")
        self._words_of = [tuple(word for word in self._owner.words if p.contains(word)) for p in tokenized]
        groups = [[p.find(word) for word in present] for p, present in zip(tokenized, self._words_of, strict=True)]
        self.words = HeatCollector(groups, tokenized[0].length, self._cross)
        self.begin()

    def begin(self) -> None:
        self._images: tuple[tuple[int, int], ...] | None = None
        self._pixels: dict[tuple[int, int], torch.Tensor] = {}
        self._kept: dict[tuple[int, int], tuple[tuple[int, int], list[LinearMap]]] = {}
        self._latent = (0, 0)
        self._bytes = 0
        if self.words is not None:
            self.words.begin()

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        chosen: set[Site] = set()
        if self._owner.words:
            chosen |= set(self._cross(sites))
        if self._owner.pixels or self._owner.components:
            chosen |= set(self._self(sites))
        return tuple(site for site in sites if site in chosen)

    def columns(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, torch.Tensor]:
        if step not in self._window or not roles.images:
            return {}
        self._images = check_same_images(self._images, roles)
        if site.kind == "self":
            return {}
        self._text_was_run |= self._text_is_new
        if self.words is None:
            raise ValueError(
                "the words' prompts are not known, as this pipeline call encodes none: pass heat_maps(..., prompts=)"
            )
        return self.words.columns(site, step, roles)

    def maps(self, site: Site, step: Step, roles: BatchRoles) -> Sequence[int]:
        return roles.select(conditional=True) if site.kind == "self" and step in self._window else ()

    def receive(
        self,
        site: Site,
        step: Step,
        roles: BatchRoles,
        columns: Mapping[int, torch.Tensor],
        maps: Mapping[int, LinearMap],
    ) -> None:
        assert site.grid is not None
        check_one_frame(site)
        if columns and self.words is not None:
            self.words.receive(site, step, roles, columns, {})
        for row, operator in maps.items():
            image = roles.image_of(row)
            if self._owner.pixels:
                rows = self._rows_at(site, operator)
                known = self._pixels.get(image)
                if known is not None and known.shape != rows.shape:
                    finest = max((known.shape[-2], known.shape[-1]), site.grid, key=lambda grid: grid[0] * grid[1])
                    known, rows = resize_maps(known, finest), resize_maps(rows, finest)
                self._pixels[image] = rows if known is None else known + rows
            if self._owner.components:
                self._keep(site, image, operator)

    def _keep(self, site: Site, image: tuple[int, int], operator: LinearMap) -> None:
        grid, kept = self._kept.setdefault(image, (site.grid or (0, 0), []))
        self._latent = site.latent or (0, 0)
        if grid != site.grid:
            raise ValueError(f"components are of layers of one grid; levels {self._levels} have {grid} and {site.grid}")
        check_components(self._owner.components, *operator.shape[2:])
        self._bytes += operator.nbytes
        if self._bytes > self._max_bytes:
            raise ValueError(
                f"the components' queries and keys take more than max_bytes={self._max_bytes:,}: read fewer steps= or "
                "deeper levels=, or allow more"
            )
        kept.append(operator)

    def _rows_at(self, site: Site, operator: LinearMap) -> torch.Tensor:
        """[pixels, height, width]: the rows of the tokens that the pixels are in, averaged over heads."""
        assert site.grid is not None and site.latent is not None
        tokens = [self._token(pixel, site.grid, site.latent) for pixel in self._owner.pixels]
        return operator.rows(tokens)[0].mean(0).reshape(-1, *site.grid).float()

    def _token(self, pixel: tuple[float, float], grid: tuple[int, int], latent: tuple[int, int]) -> int:
        """The number of the token of a layer that a pixel of the image is in."""
        (x, y), (height, width), (rows, columns) = pixel, grid, latent
        across, down = x / (columns * self._factor), y / (rows * self._factor)
        if not (0 <= across < 1 and 0 <= down < 1):
            raise ValueError(
                f"the pixel {(x, y)} is outside the image of {columns * self._factor} x {rows * self._factor} "
                "pixels (width x height)"
            )
        return int(down * height) * width + int(across * width)

    def _cross(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return text_sites(sites, self._levels)

    def _self(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        if any(site.is_joint for site in sites):
            raise ValueError(
                "pixels and components are of self-attention, and a transformer's layers attend to image and text "
                "tokens together: read words"
            )
        levels = self._levels
        if levels is None:
            known = {site.level for site in sites if site.kind == "self"}
            levels = max((level for level in known if level <= 2), default=max(known, default=0))
        return LayerSelection.parse("self", levels=levels).match(sites)

    # What was read

    def image(self, number: int) -> tuple[int, int]:
        """An image of the call, as (prompt, number among the prompt's images)."""
        if self._images is None:
            raise ValueError("no pipeline call was made inside the block, or none of its steps is in steps=: no maps")
        if not 0 <= number < len(self._images):
            raise ValueError(f"expected image to be in 0 to {len(self._images) - 1}, got {number}")
        return self._images[number]

    def prompt_of(self, number: int) -> int:
        return self.image(number)[0]

    def present(self, prompt: int) -> tuple[str, ...]:
        """The words of a prompt that were read."""
        return self._words_of[prompt] if prompt < len(self._words_of) else ()

    def pixel_sum(self, image: int) -> torch.Tensor:
        which = self.image(image)
        if which not in self._pixels:
            raise ValueError("no step of the window has run: there is no self-attention of a pixel")
        return self._pixels[which]

    def kept_row(self, pixel: tuple[float, float], image: int) -> torch.Tensor:
        """[height, width]: the mean row of the token that a pixel is in, of all that is kept."""
        operators, grid = self.kept(image)
        token = self._token(pixel, grid, self._latent)
        return torch.stack([operator.rows([token])[0].mean(0).float() for operator in operators]).mean(0).reshape(grid)

    def kept(self, image: int) -> tuple[list[LinearMap], tuple[int, int]]:
        which = self.image(image)
        if which not in self._kept:
            raise ValueError("nothing was kept for components: pass heat_maps(..., components=k), and run its steps")
        grid, kept = self._kept[which]
        return kept, grid


def _point(pixel: Any) -> tuple[float, float]:
    """A point of an image, from a pair of numbers of any kind."""
    try:
        x, y = (float(number) for number in pixel)
    except (TypeError, ValueError):
        raise ValueError(f"expected pixels to be points (x, y), such as [(256, 300)], got {pixel!r}") from None
    return x, y


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
