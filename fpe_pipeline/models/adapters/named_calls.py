"""Transformers whose pipelines guide by a second call of the model, and say in which context they call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...shadows import Shadows
from ..steps import Step, step_of_scheduler
from .adapter import Half, ModelCall, identity
from .transformer import TransformerAdapter

__all__ = ["NamedCallsAdapter"]

#: Pipelines that name no contexts, and call the model with the prompts first and then with the negative ones.
_CONDITIONAL_FIRST = frozenset(
    {
        "BriaFibo2Pipeline",
        "ChromaImg2ImgPipeline",
        "ChromaInpaintPipeline",
        "ChromaPipeline",
        "ChronoEditPipeline",
        "CogView4ControlPipeline",
        "Cosmos2TextToImagePipeline",
        "Cosmos2VideoToWorldPipeline",
        "Cosmos2_5_PredictBasePipeline",
        "FluxControlNetPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxKontextInpaintPipeline",
        "FluxKontextPipeline",
        "GlmImagePipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "JoyImageEditPipeline",
        "Kandinsky5I2IPipeline",
        "Kandinsky5I2VPipeline",
        "Kandinsky5T2IPipeline",
        "Kandinsky5T2VPipeline",
        "Krea2Pipeline",
        "Lumina2Pipeline",
        "NucleusMoEImagePipeline",
        "WanVideoToVideoPipeline",
    }
)
_HALVES: dict[str, Half] = {"cond": "conditional", "uncond": "unconditional"}


class NamedCallsAdapter(TransformerAdapter):
    """A transformer that is called in contexts named "cond" and "uncond", or in that order, at the scheduler's step."""

    guides_apart = True

    def __init__(self, pipe: Any | None, model: Any) -> None:
        super().__init__(pipe, model)
        self._context: str | None = None
        # Calls since the scheduler's latest step that said nothing of their rows; None outside of the pipeline's calls.
        self._unnamed: int | None = None
        self._place: int | None = None  # where the scheduler was at the latest of them

    def step(self, call: ModelCall) -> Step:
        return super().step(call) if self.pipe is None else step_of_scheduler(self.pipe.scheduler)

    def follow(self) -> Callable[[], None]:
        """Listen to the contexts in which the pipeline calls the model; what is returned ends it."""
        self._context, self._unnamed, self._place = None, None, None
        ends = [self._listen(identity(model)) for model in self.models.values()]

        def leave() -> None:
            for end in ends:
                end()

        return leave

    def _listen(self, module: Any) -> Callable[[], None]:
        @contextmanager
        def cache_context(original: Any, name: str, **fields: Any) -> Iterator[None]:
            before, self._context = self._context, name
            try:
                with original(name, **fields):
                    yield
            finally:
                self._context = before

        shadows = Shadows(module)
        shadows.cover("cache_context", cache_context)  # nothing where a model names no contexts
        return shadows.remove

    def called(self) -> None:
        self._unnamed = 0

    def stepped(self) -> None:
        self._unnamed = None if self._unnamed is None else 0

    def _half(self) -> Half:
        if self._context in _HALVES:
            return _HALVES[self._context]
        if self.pipe is None:
            return "as guided"
        if self._unnamed is None:
            return "conditional"
        # Solvers that call the model within a step tell of its end alone, and go on in their own count for each call.
        place = getattr(self.pipe.scheduler, "step_index", None)
        self._unnamed = 1 if place != self._place else self._unnamed + 1
        self._place = place
        if self._unnamed == 1:
            return "conditional"
        if self._unnamed == 2 and any(kind.__name__ in _CONDITIONAL_FIRST for kind in type(self.pipe).__mro__):
            return "unconditional"
        raise ValueError(
            f"{type(self.pipe).__name__} calls the model {self._unnamed} times in a step and does not say which call "
            "sees the prompts: guide without a negative prompt (true_cfg_scale=1, or guidance_scale=1 where there is "
            "no such option), or, where the model has it, call it in "
            '`with pipe.transformer.cache_context("cond"):` and "uncond"'
        )
