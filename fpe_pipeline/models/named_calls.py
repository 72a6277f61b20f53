"""Transformers whose pipelines guide by a second call of the model, and say in which context they call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .adapter import Half, ModelCall, identity
from .steps import Step, step_of_scheduler
from .transformer import TransformerAdapter

__all__ = ["NamedCallsAdapter"]

_HALVES: dict[str, Half] = {"cond": "conditional", "uncond": "unconditional"}


class NamedCallsAdapter(TransformerAdapter):
    """A transformer that is called in contexts named "cond" and "uncond", at the step that the scheduler is at."""

    guides_apart = True

    def __init__(self, pipe: Any | None, model: Any) -> None:
        super().__init__(pipe, model)
        self._context: str | None = None
        self._before: int | None = None  # the scheduler's step at the latest call that said nothing of its rows

    def step(self, call: ModelCall) -> Step:
        return super().step(call) if self.pipe is None else step_of_scheduler(self.pipe.scheduler)

    def follow(self) -> Callable[[], None]:
        """Listen to the contexts in which the pipeline calls the model; what is returned ends it."""
        self._context, self._before = None, None
        ends = [self._listen(identity(model)) for model in self.models.values()]

        def leave() -> None:
            for end in ends:
                end()

        return leave

    def _listen(self, module: Any) -> Callable[[], None]:
        original = module.cache_context

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
