"""Everything that a session hangs on a model and its pipeline besides processors, put on and taken off together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..models.adapters.adapter import ModelAdapter
from .hooks import FeatureHooks
from .pipeline_hooks import PipelineHooks

__all__ = ["ModelHooks"]


class ModelHooks:
    """Hooks before and after each call of a model, on modules of it, and on the pipeline around it.

    Args:
        adapter: of the model.
        features: paths of the modules whose rows may be replaced.
        before: is shown which of the models is called, and positional and keyword arguments of each call.
        after: is shown the output of each call.
        pipeline: makes the pipeline's hooks; not called for a model alone.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        features: Iterable[str],
        before: Callable[[str, tuple[Any, ...], dict[str, Any]], None],
        after: Callable[[Any], None],
        pipeline: Callable[[], PipelineHooks],
    ) -> None:
        self.features = FeatureHooks(adapter.module, features)
        self._handles: list[Any] = []
        self._pipeline: PipelineHooks | None = None
        self._unfollow: Callable[[], None] | None = None
        try:
            for name, model in adapter.models.items():
                self._hang(name, model, before, after)
            self._unfollow = adapter.follow()
            if adapter.pipe is not None:
                self._pipeline = pipeline()
        except BaseException:
            self.remove(expected=False)
            raise

    def _hang(
        self,
        name: str,
        model: Any,
        before: Callable[[str, tuple[Any, ...], dict[str, Any]], None],
        after: Callable[[Any], None],
    ) -> None:
        """Hooks on one of the models; a copy of it gets them too, and is in no session."""

        def first(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is model:
                before(name, args, kwargs)

        def last(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if module is model:
                after(output)

        # `model.compile()` would trace them with the model.
        self._handles.append(model.register_forward_pre_hook(torch.compiler.disable(first), with_kwargs=True))
        self._handles.append(model.register_forward_hook(torch.compiler.disable(last)))

    def check_caller(self) -> None:
        """Raise RuntimeError where a run begins that is another pipeline's."""
        if self._pipeline is not None:
            self._pipeline.check_caller()

    def remove(self, *, expected: bool) -> None:
        """Leave everything as it was found; warn where steps of the scheduler were ``expected`` and none was made."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._unfollow is not None:
            self._unfollow()
            self._unfollow = None
        self.features.remove()
        if self._pipeline is not None:
            self._pipeline.remove(expected=expected)
            self._pipeline = None
