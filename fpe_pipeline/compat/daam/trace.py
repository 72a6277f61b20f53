"""``with trace(pipe) as tc:`` and what can be asked of it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ...heatmaps.watching import watching
from ...models.sites import Site, attention_sites
from ...prompts.encoding import encoding_tokenizer
from ..given import number as whole
from ..given import numbers
from ..switch import chosen_compat
from .collector import HeadHeat
from .heads import KeptHeads
from .heatmap import GlobalHeatMap, RawHeatMapCollection

__all__ = ["DiffusionHeatMapHooker", "set_seed", "trace"]

# What DAAM asks of a layer.
_KEYS, _LEFT_OUT = 77, 8
_FACTORS = (0, 1, 2, 4, 8, 16, 32, 64)


class DiffusionHeatMapHooker:
    """Reads where the words of a pipeline call act, until its ``with`` block ends::

        with trace(pipe) as tc:
            image = pipe("a photo of a cat").images[0]
        tc.compute_global_heat_map().compute_word_heat_map("cat").plot_overlay(image, "cat.png")

    Args:
        pipeline: of diffusers, with a UNet.
        low_memory: read the first layer of each block alone.
        load_heads: compute cross-attention from what another trace saved, in the place of this run's.
        save_heads: keep what decides every cross-attention map, a file for each call of a layer.
        data_dir: where those files lie; default ``heads`` in the folder for caches.
        compat: "original" for DAAM's own numbering of layers (up blocks first), factors by the token count of a square
            512-pixel picture, none of layers with factor 8 or of other than 77 keys, half of the heads where there is
            no guidance, a fixed size of view, one prompt a call.

    Raises:
        ValueError: both ``load_heads`` and ``save_heads``, or a compat that is not known.
        TypeError: no UNet or no tokenizer.
    """

    def __init__(
        self,
        pipeline: Any,
        low_memory: bool = False,
        load_heads: bool = False,
        save_heads: bool = False,
        data_dir: Any = None,
        *,
        compat: str | None = None,
    ) -> None:
        compat = chosen_compat(compat)
        if load_heads and save_heads:
            raise ValueError("expected load_heads or save_heads, got both: a run is read or written")
        self.pipe, self.tokenizer = pipeline, encoding_tokenizer(pipeline)
        if getattr(pipeline, "unet", None) is None or self.tokenizer is None:
            raise TypeError(f"expected a pipeline with a UNet and a tokenizer, got {type(pipeline).__name__}")
        self._original, self._compat = compat == "original", compat
        self._layers = tuple(self._numbered(low_memory, with_middle=load_heads or save_heads))
        self._folder = Path.home() / ".cache" / "daam" / "heads" if data_dir is None else Path(data_dir)
        self._keeps, self._loads = load_heads or save_heads, load_heads
        paths = [site.path for site, _ in self._layers]
        self._heat = HeadHeat(paths, self.tokenizer, single=self._original)
        self._open: ExitStack | None = None

    def __enter__(self) -> DiffusionHeatMapHooker:
        if self._open is not None:
            raise RuntimeError("this trace is open already")
        with ExitStack() as stack:
            if self._keeps:
                layers = {site.path: self.pipe.unet.get_submodule(site.path) for site, _ in self._layers}
                stack.callback(KeptHeads(layers, self._folder, loads=self._loads).remove)
            stack.enter_context(watching(self.pipe, self._heat))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.__exit__(*error)

    def hook(self) -> DiffusionHeatMapHooker:
        """Begin to read, without a ``with`` block."""
        return self.__enter__()

    def unhook(self) -> None:
        """Leave the pipeline as it was found."""
        self.__exit__(None, None, None)

    restore = unhook

    def to_experiment(self, *arguments: Any, **options: Any) -> Any:
        """Not served."""
        raise NotImplementedError(
            "experiment folders are not written here: keep compute_global_heat_map() and save its pictures with "
            "compute_word_heat_map(word).plot_overlay(image, path)"
        )

    @property
    def last_prompt(self) -> str:
        """The first prompt of the latest call; empty before it."""
        return self._heat.prompts[0] if self._heat.prompts else ""

    @property
    def layer_names(self) -> list[str]:
        """By the number of a layer, its block's kind and its place in the block."""
        return [name for _, name in self._layers]

    @property
    def all_heat_maps(self) -> RawHeatMapCollection:
        """The sums over steps of the first image of the latest call."""
        return RawHeatMapCollection(dict(self._maps(0))) if self._heat.images else RawHeatMapCollection({})

    def compute_global_heat_map(
        self,
        prompt: str | None = None,
        factors: Iterable[int] | None = None,
        head_idx: int | None = None,
        layer_idx: int | None = None,
        normalize: bool = False,
        *,
        image: int = 0,
    ) -> GlobalHeatMap:
        """The heat of every token of the latest call: the mean over layers and heads of the sums over steps.

        Maps are made as large as the latent by bicubic interpolation, and clamped at 0.

        Args:
            prompt: whose tokens are shown; default: the image's.
            factors: read layers that are so many times smaller than the latent; default: all.
            head_idx: read one head of each layer.
            layer_idx: read one layer, a place in `layer_names`.
            normalize: divide by the sum over the prompt's tokens, start and end left out.
            image: index among the images of the call.

        Raises:
            RuntimeError: no call was made, or nothing was read of these factors, head and layer.
            ValueError: an image that was not made, a prompt with more tokens than the call's, or numbers that are none.
            TypeError: a prompt that is no text.
        """
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"expected prompt to be a text, got {prompt!r}")
        image = whole("image", image)
        head_idx = None if head_idx is None else whole("head_idx", head_idx)
        layer_idx = None if layer_idx is None else whole("layer_idx", layer_idx)
        if not self._heat.images:
            raise RuntimeError("there are no heat maps: call the pipeline in `with trace(pipe) as tc:` first")
        if not 0 <= image < len(self._heat.images):
            raise ValueError(f"expected image to be in 0 to {len(self._heat.images) - 1}, got {image}")
        there = _FACTORS if self._original else self._factors()
        wanted = set(there if factors is None else numbers("factors", factors))
        total, count, size = None, 0, self._view()
        for (factor, layer, head), maps in self._maps(image):
            if factor in wanted and head_idx in (None, head) and layer_idx in (None, layer):
                merged = F.interpolate(maps[None], size=size, mode="bicubic")[0].clamp_(min=0)
                total, count = merged if total is None else total + merged, count + 1
        if total is None:
            raise RuntimeError(self._nothing(wanted, head_idx, layer_idx))
        own = self._heat.prompts[self._heat.images[image][0]]
        prompt = own if prompt is None else prompt
        tokens = min(len(self.tokenizer.tokenize(prompt)) + 2, int(self.tokenizer.model_max_length))
        if tokens > total.shape[0]:
            raise ValueError(
                f"{prompt!r} has {tokens} tokens, and {total.shape[0]} were read of {own!r}: ask for a prompt of the "
                "call"
            )
        heat = (total / count)[:tokens]
        if normalize:
            heat = heat / (heat[1:-1].sum(0, keepdim=True) + 1e-6)
        return GlobalHeatMap(self.tokenizer, prompt, heat, compat=self._compat)

    def _numbered(self, low_memory: bool, *, with_middle: bool) -> Iterator[tuple[Site, str]]:
        """The cross-attention layers in the order of their numbers, each with its name."""
        cross = [site for site in attention_sites(self.pipe.unet) if site.kind == "cross"]
        places = ("up", "down", "mid") if self._original else ("down", "mid", "up")
        for place in places:
            counts: dict[str, int] = {}
            for site in cross:
                if site.place == place and (place != "mid" or with_middle):
                    block = site.path.split(".attentions.")[0]
                    number = counts[block] = counts.get(block, -1) + 1
                    if number == 0 or not low_memory:
                        yield site, f"{place}-attn-{number}"

    def _maps(self, image: int) -> Iterator[tuple[tuple[int, int, int], torch.Tensor]]:
        """By (factor, layer, head), the sums over steps of an image [tokens, h, w]."""
        assert self._heat.images is not None
        for number, (site, _) in enumerate(self._layers):
            factor = self._factor(site.path)
            if factor is None:
                continue
            which = self._heat.images if self._original else (self._heat.images[image],)
            heads = [head for one in which for head in self._heat.sums[one, site.path]]
            if self._original and not self._heat.guided:
                heads = heads[len(heads) // 2 :]
            yield from (((factor, number, head), maps) for head, maps in enumerate(heads))

    def _factor(self, path: str) -> int | None:
        """How many times smaller than the latent a layer is; None where it is left out."""
        site = self._heat.sites.get(path)
        if site is None:
            return None
        if not self._original:
            return 2**site.level
        assert site.tokens is not None and site.grid is not None
        if site.grid[0] != site.grid[1]:
            raise ValueError(
                f'DAAM reads square pictures, and {path} has {site.grid}: leave compat="original" out to read any'
            )
        factor = isqrt(self._latent() // site.tokens)
        return None if factor == _LEFT_OUT or int(self.tokenizer.model_max_length) != _KEYS else factor

    def _factors(self) -> set[int]:
        return {2**site.level for site in self._heat.sites.values()}

    def _latent(self) -> int:
        """The tokens of the latent, as DAAM takes them to be."""
        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        return 4096 if side in (512, 1024) else 9216

    def _view(self) -> tuple[int, int]:
        if self._original:
            return isqrt(self._latent()), isqrt(self._latent())
        (size, *_) = {site.latent for site in self._heat.sites.values()}
        assert size is not None
        return size

    def _nothing(self, factors: set[int], head: int | None, layer: int | None) -> str:
        there = self.all_heat_maps
        return (
            f"nothing was read of factors {sorted(factors)}, head {head} and layer {layer}: there are factors "
            f"{sorted(there.factors())}, heads {sorted(there.heads())} and layers {sorted(there.layers())}"
        )


trace = DiffusionHeatMapHooker


def set_seed(seed: int) -> torch.Generator:
    """Seed Python's, NumPy's and PyTorch's random numbers, and return a generator of that seed where pictures are
    computed: on CUDA where there is it.

    Raises:
        ValueError: a seed that is no whole number, of NumPy's and PyTorch's too, or not from 0 to 2**32 - 1.
    """
    seed = whole("seed", seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected a whole number from 0 to {2**32 - 1}, which NumPy takes, got {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
