"""Every method as the comparison runs it, and the two baselines that every figure has to be held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...edits import Edit, FreePromptEdit
from ...edits.registry import METHODS, make_edit
from ...errors import InputError
from .subjects import Subject

__all__ = ["CONTENDERS", "DIFFERENT_NOISE", "NO_EDIT", "Contender", "Unfit", "chosen", "contenders"]

NO_EDIT, DIFFERENT_NOISE = "no edit", "different noise"


class Unfit(ValueError):
    """An edit that a method has no way of making; the message is the reason."""


@dataclass(frozen=True)
class Contender:
    """One method with its settings.

    Args:
        name: what tables and ``--methods`` call it.
        about: its settings in words.
        options: of a subject, those that the method needs beside its defaults for the model; None for the baselines.
        alone: whether the target is drawn without its source, from other noise.
    """

    name: str
    about: str
    options: Callable[[Subject], dict[str, Any]] | None = None
    alone: bool = False

    def edit_for(self, subject: Subject, tokenizer: Any, model: Any) -> Edit:
        """The edit of a subject; one that replaces nothing where nothing is edited.

        Args:
            subject: the picture and what it is to become.
            tokenizer: the pipeline's.
            model: the pipeline or its UNet, which decides the method's layers.

        Raises:
            Unfit: the method cannot make this edit.
        """
        if self.options is None:
            return FreePromptEdit(0)
        prompts = (subject.source_prompt, subject.target_prompt)
        try:
            return make_edit(self.name, prompts, tokenizer, model, **self.options(subject))
        except Unfit:
            raise
        except ValueError as error:
            raise Unfit(str(error)) from error


def contenders(self_replace: float = 0.8) -> tuple[Contender, ...]:
    """All of them, the baselines first: every method of the registry with its defaults for the model.

    Args:
        self_replace: share of the steps in which Free-Prompt-Editing replaces maps.
    """
    window = f"in the first {100 * self_replace:g} % of the steps"

    def options(name: str) -> Callable[[Subject], dict[str, Any]]:
        given = {"self_replace_steps": self_replace} if METHODS[name].edit is FreePromptEdit else {}
        words = _WORDS.get(name, lambda subject: {})
        return lambda subject: {**given, **words(subject)}

    return (
        Contender(NO_EDIT, "the target from the source's noise, or from the real image's inverted latents"),
        Contender(DIFFERENT_NOISE, "the target alone, from other noise", alone=True),
        *(Contender(name, method.about.format(window=window), options(name)) for name, method in METHODS.items()),
    )


def _object(subject: Subject) -> dict[str, Any]:
    if subject.object_word is None:
        raise Unfit("no word says where maps are to be replaced: name it as `object` in the prompts file")
    return {"word": subject.object_word}


def _region(subject: Subject) -> dict[str, Any]:
    if subject.region_words is None:
        raise Unfit("no words say what may change: name `object` and `target_object` in the prompts file")
    return {"words": subject.region_words}


def _new(subject: Subject) -> dict[str, Any]:
    if not subject.new_words:
        raise Unfit("the target prompt has no word that the source prompt has not")
    return {}


# The words of a subject, for the methods that look for them.
_WORDS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "fpe-regional": _object,
    "p2p-blend": _region,
    "p2p-reweight": _new,
}

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
