"""How strongly an edit acts where: a strength for each step and level, and a mask over the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..images.load import load_image
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, StepWindow
from ..prompts.encoding import Encoding
from ..prompts.joint_text import encoded_prompts
from ..prompts.words import tokenize
from .selection import LayerSelection, truth_value, unit_number, whole_numbers
from .watchers import HeatCollector, resize_maps

__all__ = ["MaskImage", "Strength", "WordMask", "blended_sites", "text_sites"]

Schedule = tuple[float, ...]
Shares = tuple[float, float] | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Strength:
    """A number in [0, 1] for each step and level; made by :meth:`parse`.

    Args:
        by_level: schedules by level; None stands for every level that is not named.
        function: in place of both.
    """

    by_level: tuple[tuple[int | None, Schedule], ...] = ((None, (1.0,)),)
    function: Callable[[Site, Step], float] | None = None

    @classmethod
    def parse(cls, value: Any) -> Strength:
        """From what users write.

        Args:
            value: a number; a sequence of numbers, spread evenly over the edit's steps with straight lines between
                them, so that ``(1, 0)`` fades out; a mapping from level to either; or a function of site and step.

        Raises:
            ValueError: anything else, or numbers outside [0, 1].
        """
        if isinstance(value, Strength):
            return value
        if callable(value) and not isinstance(value, torch.Tensor):
            return cls((), value)
        if isinstance(value, Mapping):
            if not value:
                raise ValueError("expected a strength for at least one level, got an empty mapping")
            levels = [(whole_numbers("a level of strength=", [level])[0], _schedule(v)) for level, v in value.items()]
            return cls(tuple(sorted(levels)))
        return cls(((None, _schedule(value)),))

    @property
    def is_constant(self) -> bool:
        """Whether it is the same at every step."""
        return self.function is None and all(len(schedule) == 1 for _, schedule in self.by_level)

    def at(self, site: Site, step: Step, window: StepWindow, compat: str | None = None) -> float:
        """The strength at a site in a step of the window."""
        if self.function is not None:
            return unit_number(self.function(site, step), "the strength that the function gave")
        by_level = dict(self.by_level)
        schedule = by_level.get(site.level, by_level.get(None, (1.0,)))
        steps = window.steps(step.total)
        if len(schedule) == 1 or len(steps) < 2:
            return schedule[0]
        place = (step.place(compat) - steps.start) / (len(steps) - 1) * (len(schedule) - 1)
        before = min(max(int(place), 0), len(schedule) - 2)
        share = place - before
        return (1 - share) * schedule[before] + share * schedule[before + 1]


class MaskImage:
    """A mask as large as the image, in any resolution: white (1) where an edit acts fully, black (0) where not at all.

    A token's weight is the mask's mean over the token's part of the image; of a video every frame has the same mask.

    Args:
        image: the path of a picture, or a PIL image (both taken as grey, turned the right way up), or an array or
            tensor [h, w]: bool, integers of 0 and 1 alone, 8-bit integers, or floats in [0, 1]. A picture of 0 and 1
            alone, as tools for segmentation write it, is no nearly black one.

    Raises:
        ValueError: another shape or values outside [0, 1], a picture with transparent parts, which do not say whether
            colour or transparency is the mask, or one that cannot be read.
        TypeError: anything else.
    """

    def __init__(self, image: Any) -> None:
        self.values = _mask_values(image)  # [h, w], float64
        self._weights: dict[tuple[int, ...], torch.Tensor] = {}
        # By grid and frames the latest strength with its shares: one pair of tensors for as long as the strength stays.
        self._shares: dict[tuple[int, ...], tuple[float, Shares]] = {}

    def __repr__(self) -> str:
        height, width = self.values.shape
        return f"MaskImage({width} x {height}, mean {self.values.mean():.3g})"

    def weights(self, site: Site, roles: BatchRoles, source: int) -> torch.Tensor:
        """[N], for the tokens of a site.

        Raises:
            ValueError: the mask's proportions are not the image's.
        """
        assert site.grid is not None
        if site.latent is not None:
            self._check_proportions(*site.latent)
        key = (*site.grid, site.frames)
        if key not in self._weights:
            pooled = torch.nn.functional.adaptive_avg_pool2d(self.values[None, None], site.grid)
            self._weights[key] = pooled.flatten().repeat(site.frames)
        return self._weights[key]

    def shares(self, strength: float, site: Site, roles: BatchRoles, source: int) -> Shares:
        """Weights [N] of the source's map and of the target's own."""
        weights = self.weights(site, roles, source)
        assert site.grid is not None
        key = (*site.grid, site.frames)
        if key not in self._shares or self._shares[key][0] != strength:
            self._shares[key] = strength, _shares(strength * weights)
        return self._shares[key][1]

    def _check_proportions(self, height: int, width: int) -> None:
        rows, columns = self.values.shape
        if abs(rows * width / columns - height) >= 1 or abs(columns * height / rows - width) >= 1:
            raise ValueError(
                f"the mask has {columns} x {rows} pixels (width x height) and the latents {width} x {height}: make a "
                "mask of the image's proportions, such as one of its own size"
            )


@dataclass(frozen=True)
class WordMask:
    """A mask from the heat of a word: the attention it has had so far in the run, of the source image.

    Until the first step has passed there is no heat, and the edit acts everywhere.

    Args:
        prompt: the source prompt.
        word: a word or phrase of it.
        tokenizer: the pipeline's.
        threshold: share of the largest heat from which the mask is 1, and 0 below; None keeps it soft, the heat as a
            share of the largest.
        invert: act where the word is *not*.
        levels: levels of cross-attention to read; default as :class:`LocalBlend`.

    Raises:
        ValueError: the word is not in the prompt.
    """

    prompt: str
    word: str
    tokenizer: Any = field(repr=False, compare=False)
    threshold: float | None = None
    invert: bool = False
    levels: Any = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            unit_number(self.threshold, "threshold")
        if self.levels is not None:
            object.__setattr__(self, "levels", whole_numbers("levels", self.levels))
        object.__setattr__(self, "invert", truth_value(self.invert, "invert"))
        tokenize(self.prompt, self.tokenizer).find(self.word)

    def begin(self) -> RunningWordMask:
        """The mask of one session."""
        return RunningWordMask(self)


class RunningWordMask:
    """A :class:`WordMask` in a session, with the heat so far."""

    def __init__(self, mask: WordMask) -> None:
        self._mask = mask
        self.collector = _SourceHeat(mask)

    def weights(self, site: Site, roles: BatchRoles, source: int) -> torch.Tensor:
        """[N], for the tokens of a site.

        Raises:
            ValueError: a source of another prompt than the mask's, in which its word is not known.
        """
        assert site.grid is not None
        self.collector.check(roles.prompt_of(source))
        heat = self.collector.heat(roles.image_of(source))
        if heat is None:
            return torch.ones(site.tokens or 0, dtype=torch.float64)
        share = heat / heat.amax().clamp_min(torch.finfo(heat.dtype).tiny)
        share = resize_maps(share, site.grid)[0].flatten()
        if self._mask.threshold is not None:
            share = (share >= self._mask.threshold).to(share)
        return 1 - share if self._mask.invert else share

    def shares(self, strength: float, site: Site, roles: BatchRoles, source: int) -> Shares:
        """Weights [N] of the source's map and of the target's own."""
        return _shares(strength * self.weights(site, roles, source))


class _SourceHeat(HeatCollector):
    """Heat of one word in the rows of sources that have its prompt."""

    def __init__(self, mask: WordMask) -> None:
        self._mask, self._prompt = mask, tokenize(mask.prompt, mask.tokenizer)
        self._prompts: tuple[str, ...] | None = None  # of the call; None where it is not known, of a model alone
        tokens = self._prompt.find(mask.word)
        super().__init__([[tokens]], self._prompt.length, lambda sites: blended_sites(sites, mask.levels))

    def encoded(self, encoding: Encoding) -> None:
        if encoding.prompts is None:
            return
        prompts = [tokenize(prompt, self._mask.tokenizer) for prompt in encoding.prompts]
        placed = encoded_prompts(encoding, prompts)
        own = [prompt for prompt in placed if prompt.text == self._prompt.text]
        if not own:
            raise ValueError(
                f"the mask of {self._mask.word!r} is written for the source prompt {self._mask.prompt!r}, got "
                f"{list(encoding.prompts)}: write it for the source of the call"
            )
        self.watch_tokens([[prompt.find(self._mask.word)] if prompt in own else () for prompt in placed], own[0].length)
        self._prompts = encoding.prompts

    def check(self, prompt: int) -> None:
        """Raise ValueError for a source whose prompt is not the mask's, where the word's places are another's."""
        if self._column(prompt) is None:
            raise ValueError(
                f"the mask of {self._mask.word!r} is written for the source prompt {self._mask.prompt!r}, and prompt "
                f"{prompt + 1} of {list(self._prompts or ())} is a source too: edit its targets in a call of their own"
            )

    def columns(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, torch.Tensor]:
        of_rows = {row: self._column(roles.prompt_of(row)) for row in roles.sources}
        return {row: column for row, column in of_rows.items() if column is not None}

    def _column(self, prompt: int) -> torch.Tensor | None:
        """Where the word is in a prompt of the call; None in those that are not the mask's."""
        if self._prompts is None:
            return self._columns[0]
        return self._columns[prompt] if prompt < len(self._columns) else None


def _shares(weights: torch.Tensor) -> Shares:
    # A mask that is one number in this layer saves a map. Heat lives on the device, where asking would wait for it.
    if weights.device.type == "cpu" and bool((weights == weights[0]).all()):
        return float(weights[0]), 1.0 - float(weights[0])
    return weights, 1.0 - weights


def blended_sites(sites: tuple[Site, ...], levels: tuple[int, ...] | None) -> tuple[Site, ...]:
    """Cross-attention layers of encoder and decoder whose heat says where a word is.

    By default those of level 2 (16² tokens at 512 px in SD 1.x and 2.x), or of the deepest level where there are none;
    all layers of joint attention of a transformer.
    """
    if any(site.is_joint for site in sites):
        return text_sites(sites, levels)
    cross = tuple(site for site in LayerSelection.parse("cross").match(sites) if site.place != "mid")
    by_default = levels is None
    if levels is None:
        levels = (min(2, max((site.level for site in cross), default=2)),)
        if not any(site.level in levels for site in cross):
            levels = (max((site.level for site in cross), default=2),)
    return LayerSelection.parse("cross", levels=levels).match(cross, by_default=by_default)


def text_sites(sites: tuple[Site, ...], levels: Any) -> tuple[Site, ...]:
    """Layers in which image tokens look at words: of cross-attention, or a transformer's of joint attention.

    Raises:
        ValueError: levels of a transformer, which has none, or that match no layer.
    """
    if not any(site.is_joint for site in sites):
        return LayerSelection.parse("cross", levels=levels).match(sites)
    if levels is not None:
        raise ValueError(f"levels={levels} tell resolutions apart, and a transformer has one: leave them out")
    return LayerSelection.parse("joint").match(sites)


def _schedule(value: Any) -> Schedule:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ValueError("expected a strength for at least one step, got an empty sequence")
        return tuple(unit_number(number, "strength") for number in value)
    return (unit_number(value, "strength"),)


def _mask_values(image: Any) -> torch.Tensor:
    if isinstance(image, str | Path):
        load_image(image)  # says what is wrong with it; as a picture it is scaled and blended, which a mask is not
        with Image.open(image) as opened:
            values = _grey_values(opened)
    elif isinstance(image, Image.Image):
        values = _grey_values(image)
    elif isinstance(image, torch.Tensor | np.ndarray | Sequence):
        if isinstance(image, np.ndarray):  # of which torch takes neither flipped views nor the other order of bytes
            image = image.astype(image.dtype.newbyteorder("="), order="C")
        values = torch.as_tensor(image).detach().cpu()
        if not values.is_floating_point() and bool(((values == 0) | (values == 1)).all()):
            values = values.bool()
        if not values.is_floating_point() and values.dtype not in (torch.bool, torch.uint8):
            raise ValueError(f"expected a mask of bools, 8-bit integers or floats in [0, 1], got {values.dtype}")
        values = values.double() / (255.0 if values.dtype == torch.uint8 else 1.0)
        if values.ndim == 3 and 1 in (values.shape[0], values.shape[-1]):
            values = values.squeeze(0 if values.shape[0] == 1 else -1)
    else:
        raise TypeError(
            "expected a mask as a path, a PIL image, an array [height, width] or a WordMask, got "
            f"{type(image).__name__}"
        )
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"expected a mask [height, width], got shape {tuple(values.shape)}")
    if not bool(((values >= 0) & (values <= 1)).all()):  # NaN fails too
        raise ValueError(
            f"expected mask values in [0, 1], got {values.min().item():.4g} to {values.max().item():.4g}: divide by "
            "the largest, or pass 8-bit integers"
        )
    return values


def _grey_values(image: Image.Image) -> torch.Tensor:
    """[h, w], float64: a picture's grey as shares of its white."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode == "La" else "RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            raise ValueError(
                "the mask has transparent parts, and whether it is drawn in its colours or in its transparency cannot "
                "be told: pass image.getchannel('A'), or image.convert('L') for the colours alone"
            )
    if image.mode == "LAB":  # which Pillow turns into colours alone
        image = image.convert("RGB")
    largest = 1.0 if image.mode == "F" else 65535.0 if image.mode.startswith("I") else 255.0
    if largest == 255.0:
        image = image.convert("L")
        if image.getextrema()[1] == 1:
            largest = 1.0
    return torch.from_numpy(np.asarray(image).astype(np.float64) / largest)
