"""FLUX.1: dual blocks with a stream of image tokens and one of text tokens, then single blocks with one for both.

The order in a layer is text, image. The model receives latents that are packed, a token for each 2 × 2 of them, with
the place of each token, and a timestep that is scaled: the step is the scheduler's. Guidance is part of the model;
where a pipeline guides with a negative prompt as well it calls the model twice, in contexts named "cond" and "uncond".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .adapter import Half, ModelCall
from .sites import Place, Site
from .steps import Step, step_of_scheduler
from .transformer import TransformerAdapter

__all__ = ["FluxAdapter"]

_HALVES: dict[str, Half] = {"cond": "conditional", "uncond": "unconditional"}
_PACKED = 2


class FluxAdapter(TransformerAdapter):
    """diffusers' ``FluxTransformer2DModel``."""

    family = "flux"
    guides_apart = True
    text_parts = (("tokenizer_2", ("text_encoder_2",)),)

    def __init__(self, pipe: Any | None, model: Any) -> None:
        super().__init__(pipe, model)
        self._context: str | None = None
        self._before: int | None = None  # the scheduler's step at the latest call that said nothing of its rows

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        dual, single = module.transformer_blocks, module.single_transformer_blocks
        places: list[tuple[Place, str, Any]] = [("dual", f"transformer_blocks.{i}", b) for i, b in enumerate(dual)]
        places += [("single", f"single_transformer_blocks.{i}", b) for i, b in enumerate(single)]
        return tuple(
            Site(f"{path}.attn", place, "joint", index, block.attn.heads, 0, (), patch=_PACKED)
            for index, (place, path, block) in enumerate(places)
        )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = inspect.signature(type(self.module).forward).bind(None, *args, **kwargs).arguments
        sample, places = given["hidden_states"], given["img_ids"]
        size = _size(places if places.ndim == 2 else places[0], sample.shape[1])
        return ModelCall(sample, given["timestep"], size, half=self._half(), arguments=(args, kwargs))

    def step(self, call: ModelCall) -> Step:
        return super().step(call) if self.pipe is None else step_of_scheduler(self.pipe.scheduler)

    def follow(self) -> Callable[[], None]:
        """Listen to the contexts in which the pipeline calls the model; what is returned ends it."""
        module: Any = self.module
        original, self._context, self._before = module.cache_context, None, None

        @contextmanager
        def cache_context(name: str, **fields: Any) -> Iterator[None]:
            before, self._context = self._context, name
            try:
                with original(name, **fields):
                    yield
            finally:
                self._context = before

        module.cache_context = cache_context

        def leave() -> None:
            if vars(module).get("cache_context") is cache_context:
                del module.cache_context

        return leave

    def _half(self) -> Half:
        if self._context in _HALVES:
            return _HALVES[self._context]
        if self.pipe is None:
            return "as guided"
        step = getattr(self.pipe.scheduler, "step_index", None)
        if step is not None and step == self._before:
            raise ValueError(
                f"{type(self.pipe).__name__} calls the model twice in step {step} and does not say which call sees the "
                "prompts: guide without a negative prompt (true_cfg_scale=1), or call the model in "
                '`with pipe.transformer.cache_context("cond"):` and "uncond"'
            )
        self._before = step
        return "conditional"


def _size(places: Any, tokens: int) -> tuple[int, int]:
    """(height, width) of the latents, from the places [N, 3] of their tokens: (picture, row, column)."""
    extent = (places.amax(0) - places.amin(0)).tolist()
    height, width = (int(side) + 1 for side in extent[1:])
    if extent[0] or height * width != tokens:
        raise ValueError(
            f"the model got {tokens} image tokens in {height} rows and {width} columns: tokens of a reference "
            "picture among them (Kontext) are not described yet; edit with a pipeline that denoises all of its tokens"
        )
    return height * _PACKED, width * _PACKED
