"""diffusers' modular pipelines: blocks with a common state, and a guider that calls the model once for each condition.

A call of the model holds rows of one half, and the guider says of which: its first condition is that of the prompts.
Pipelines without a guider, which are distilled or read their guidance as a number, call it for the prompts alone;
Ideogram 4's guide by a model of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from ...shadows import Shadows
from .adapter import Half, ModelAdapter, ModelCall

__all__ = ["by_guider", "is_modular"]

#: What guiders that guide by the prompts and by negative ones call their predictions.
_PREDICTIONS = ["pred_cond", "pred_uncond"]
#: Families of which blocks encode prompts inside the same text as pipelines do, and place them alike.
_ENCODE_ALIKE = ("cosmos", "flux2", "flux3", "ideogram4", "qwen", "z_image")


def is_modular(pipe: Any) -> bool:
    """Whether this is one of diffusers' modular pipelines."""
    return any(kind.__name__ == "ModularPipeline" for kind in type(pipe).__mro__)


@cache
def by_guider(family: type[ModelAdapter]) -> type[ModelAdapter]:
    """The adapter of a family whose calls a modular pipeline makes."""
    return type(f"Modular{family.__name__}", (_GuiderCalls, family), {"__doc__": family.__doc__})


class _GuiderCalls(ModelAdapter):
    """What differs where a guider calls the model, whatever its family; stands before the family's adapter."""

    guides_apart = True
    prompts_first = False
    tells_all_it_encodes = True
    encodes_in_parts = False

    def __init__(self, pipe: Any, model: Any) -> None:
        super().__init__(pipe, model)
        if not self._tells_templates():
            self.words_refused = (
                f"the blocks of {type(pipe).__name__} do not say what text they encode prompts in, so that no word is "
                "found there: use an edit that looks for none, such as FreePromptEdit, ConsistEdit or MasaCtrlEdit, or "
                "a pipeline of the same parts that is not modular"
            )
        self._listened: dict[int, tuple[Any, Shadows]] = {}  # guiders, and what covers their methods
        self._guider: Any = None  # the one that prepared the call under way
        self._unguided = 0  # calls since the scheduler's latest step that no guider prepared

    def _tells_templates(self) -> bool:
        """Whether it can be read what stands around the prompts; blocks say so in other places than pipelines do."""
        templates = [part.template for part in self.text_parts if part.template is not None]
        if templates and self.family not in _ENCODE_ALIKE:
            return False
        try:
            for template in templates:
                template(self.pipe, {})
        except AttributeError:
            return False
        return True

    def follow(self) -> Callable[[], None]:
        """Listen to which guider prepares a call of the model; what is returned ends it."""
        leave = super().follow()
        self._listen_to_guiders()
        self._guider, self._unguided = None, 0

        def end() -> None:
            for _, shadows in self._listened.values():
                shadows.remove()
            self._listened = {}
            leave()

        return end

    def _listen_to_guiders(self) -> None:
        """Listen to those guiders of the pipeline that are not listened to yet."""
        for guider in _guiders(self.pipe):
            if id(guider) not in self._listened:
                self._listened[id(guider)] = guider, self._covered(guider)

    def _covered(self, guider: Any) -> Shadows:
        def prepare_models(original: Any, *args: Any, **kwargs: Any) -> Any:
            self._guider = guider
            return original(*args, **kwargs)

        def cleanup_models(original: Any, *args: Any, **kwargs: Any) -> Any:
            self._guider = None
            return original(*args, **kwargs)

        shadows = Shadows(guider)
        shadows.cover("prepare_models", prepare_models)
        shadows.cover("cleanup_models", cleanup_models)
        return shadows

    def called(self) -> None:
        super().called()
        self._listen_to_guiders()  # one may have been put into the pipeline since
        self._guider, self._unguided = None, 0

    def stepped(self) -> None:
        super().stepped()
        self._unguided = 0

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        call = super().read(args, kwargs)  # type: ignore[safe-super]
        return call if self.shows_half else replace(call, half=self._condition())

    def _half(self) -> Half:
        return "as guided"  # the guider says it, once for each call (`read`)

    def _condition(self) -> Half:
        """Of which half the rows of the call under way are.

        Raises:
            ValueError: a guider with further conditions, or several calls a step that no guider prepares.
        """
        if self._guider is not None:
            name, predictions = type(self._guider).__name__, getattr(self._guider, "_input_predictions", None)
            if predictions != _PREDICTIONS:
                raise ValueError(
                    f"{name} calls the model for {predictions}, in a way that an edit does not know: guide by "
                    "ClassifierFreeGuidance, or by another guider of prompts and negative prompts alone "
                    "(pipe.update_components(guider=…))"
                )
            return "conditional" if self._guider.is_conditional else "unconditional"
        self._unguided += 1
        if self._unguided > 1:
            raise ValueError(
                f"the blocks of {type(self.pipe).__name__} call the model {self._unguided} times in a step, and no "
                "guider says which call sees the prompts: call guider.prepare_models(model) before each, as diffusers' "
                "own blocks do"
            )
        return "conditional"


def _guiders(pipe: Any) -> list[Any]:
    """The guiders among a pipeline's components; Wan 2.2's has two."""
    return [part for part in pipe.components.values() if hasattr(part, "prepare_models")]
