"""Every method as the comparison runs it, and the two baselines that every figure has to be held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..edits import (
    Edit,
    FreePromptEdit,
    LocalBlend,
    MasaCtrlEdit,
    PlugAndPlayEdit,
    PromptToPromptEdit,
    StyleAlignedEdit,
    WordMask,
)
from ..loading import InputError
from .subjects import Subject

__all__ = ["CONTENDERS", "DIFFERENT_NOISE", "NO_EDIT", "Contender", "Unfit", "chosen", "contenders"]

NO_EDIT, DIFFERENT_NOISE = "no edit", "different noise"
# Free-Prompt-Editing's own limit; the embedded model has no layer above it.
_MAX_TOKENS = 32**2
_HALF, _HEAT, _FACTOR = 0.5, 0.5, 2.0


class Unfit(ValueError):
    """An edit that a method has no way of making; the message is the reason."""


@dataclass(frozen=True)
class Contender:
    """One method with its settings.

    Attributes:
        name: what tables and ``--methods`` call it.
        about: its settings in words.
        make: the edit of a subject with a pipeline's tokenizer; ``None`` for the baselines.
        alone: whether the target is drawn without its source, from other noise.
    """

    name: str
    about: str
    make: Callable[[Subject, Any], Edit] | None = None
    alone: bool = False

    def edit_for(self, subject: Subject, tokenizer: Any) -> Edit:
        """The edit of a subject; one that replaces nothing where nothing is edited.

        Raises:
            Unfit: the method cannot make this edit.
        """
        if self.make is None:
            return FreePromptEdit(0)
        try:
            return self.make(subject, tokenizer)
        except Unfit:
            raise
        except ValueError as error:
            raise Unfit(str(error)) from error


def contenders(self_replace: float = 0.8) -> tuple[Contender, ...]:
    """All of them, the baselines first.

    Args:
        self_replace: share of the steps in which Free-Prompt-Editing replaces maps; the other methods have their
            authors' settings, with layers counted from the decoder's beginning.
    """

    def free_prompt(**options: Any) -> FreePromptEdit:
        return FreePromptEdit(self_replace, max_tokens=_MAX_TOKENS, **options)

    def regional(subject: Subject, tokenizer: Any) -> Edit:
        if subject.object_word is None:
            raise Unfit("no word says where maps are to be replaced: name it as `object` in the prompts file")
        return free_prompt(mask=WordMask(subject.source_prompt, subject.object_word, tokenizer, threshold=_HEAT))

    def blended(subject: Subject, tokenizer: Any) -> Edit:
        if subject.region_words is None:
            raise Unfit("no words say what may change: name `object` and `target_object` in the prompts file")
        prompts = (subject.source_prompt, subject.target_prompt)
        return _prompt_to_prompt(subject, tokenizer) + LocalBlend(prompts, tokenizer, subject.region_words)

    def reweighted(subject: Subject, tokenizer: Any) -> Edit:
        if not subject.new_words:
            raise Unfit("the target prompt has no word that the source prompt has not")
        return _prompt_to_prompt(subject, tokenizer, weights=dict.fromkeys(subject.new_words, _FACTOR))

    window = f"in the first {100 * self_replace:g} % of the steps"
    return (
        Contender(NO_EDIT, "the target from the source's noise, or from the real image's inverted latents"),
        Contender(DIFFERENT_NOISE, "the target alone, from other noise", alone=True),
        Contender("fpe", f"self-attention maps replaced {window}", lambda s, t: free_prompt()),
        Contender("fpe-soft", f"fpe at strength {_HALF:g}", lambda s, t: free_prompt(strength=_HALF)),
        Contender(
            "fpe-regional", f"fpe where the heat of the source's object is above {_HEAT:g} of its largest", regional
        ),
        Contender(
            "p2p-replace",
            "cross-attention to 0.8, self-attention to 0.4 of the steps, words aligned by their place",
            _prompt_to_prompt,
        ),
        Contender(
            "p2p-refine",
            "p2p-replace with the words that both prompts have aligned",
            lambda s, t: _prompt_to_prompt(s, t, align="refine"),
        ),
        Contender("p2p-reweight", f"p2p-replace, the new word times {_FACTOR:g}", reweighted),
        Contender(
            "p2p-blend",
            "p2p-replace, latents kept outside the heat of the object, or of the place that changes",
            blended,
        ),
        Contender("masactrl", "from step 4 on, in the decoder", lambda s, t: MasaCtrlEdit(layers=("up_blocks",))),
        Contender("pnp", "maps to 0.5, features to 0.8 of the steps", lambda s, t: PlugAndPlayEdit()),
        Contender("style-aligned", "the source's tokens among the keys", lambda s, t: StyleAlignedEdit()),
    )


def _prompt_to_prompt(subject: Subject, tokenizer: Any, **options: Any) -> PromptToPromptEdit:
    prompts = (subject.source_prompt, subject.target_prompt)
    return PromptToPromptEdit(prompts, tokenizer, max_tokens=_MAX_TOKENS, **options)


#: Names of all contenders.
CONTENDERS = tuple(contender.name for contender in contenders())


def chosen(names: Sequence[str], self_replace: float = 0.8) -> tuple[Contender, ...]:
    """The contenders of these names, in their own order; all of them where no name is given.

    Raises:
        InputError: an unknown name.
    """
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise InputError(f"unknown methods {', '.join(map(repr, unknown))}: expected some of {', '.join(CONTENDERS)}")
    return tuple(c for c in contenders(self_replace) if not names or c.name in names)
