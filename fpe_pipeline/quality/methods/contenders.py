"""Every method as the comparison runs it, and the two baselines that every figure has to be held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...edits import Edit, FreePromptEdit
from ...edits.method import REQUIRED, Method, Served, Unfit
from ...edits.method_class import names_a_class, origin_of
from ...edits.registry import find_method, make_edit, methods_of
from ...errors import InputError, refusals
from ...models.adapters.families import adapter_of
from ...texts import did_you_mean
from .subjects import Subject

__all__ = ["CONTENDERS", "DIFFERENT_NOISE", "NO_EDIT", "Contender", "Unfit", "chosen", "contenders"]

NO_EDIT, DIFFERENT_NOISE = "no edit", "different noise"


@dataclass(frozen=True)
class Contender:
    """One method with its settings.

    Args:
        name: what tables and ``--methods`` call it.
        about: its settings in words.
        options: of a subject, those that the method needs beside its defaults for the model; None for the baselines.
        alone: whether the target is drawn without its source, from other noise.
        method: what :func:`make_edit` calls it, where that is not the name.
    """

    name: str
    about: str
    options: Callable[[Subject], dict[str, Any]] | None = None
    alone: bool = False
    method: str | None = None

    def edit_for(self, subject: Subject, tokenizer: Any, model: Any) -> Edit:
        """The edit of a subject; one that replaces nothing where nothing is edited.

        Args:
            subject: the picture and what it is to become.
            tokenizer: the pipeline's.
            model: the pipeline, its UNet or its transformer, which decides the method's layers.

        Raises:
            Unfit: the method cannot make this edit.
        """
        if self.options is None:
            return FreePromptEdit(0)
        prompts = (subject.source_prompt, subject.target_prompt)
        try:
            edit = make_edit(self.method or self.name, prompts, tokenizer, model, **self.options(subject))
            if getattr(model, "transformer", None) is not None:
                edit.select(adapter_of(model).sites)  # methods whose layers are known for one transformer alone
            return edit
        except Unfit:
            raise
        except ValueError as error:
            # A list of the layers may follow, which has no place in a table.
            raise Unfit(str(error).splitlines()[0].removesuffix(" with layers=")) from error


def contenders(self_replace: float = 0.8, kind: Served = "unet") -> tuple[Contender, ...]:
    """All of them, the baselines first: every method of a kind of model with its defaults for the model.

    Args:
        self_replace: share of the steps in which Free-Prompt-Editing replaces maps.
        kind: of model.
    """
    window = f"in the first {100 * self_replace:g} % of the steps"

    return (
        Contender(NO_EDIT, "the target from the source's noise, or from the real image's inverted latents"),
        Contender(DIFFERENT_NOISE, "the target alone, from other noise", alone=True),
        *(
            Contender(name, method.about.format(window=window), _options(method, self_replace))
            for name, method in methods_of(kind).items()
        ),
    )


def _options(method: Method, self_replace: float) -> Callable[[Subject], dict[str, Any]]:
    given = {} if method.window is None else {method.window: self_replace}
    return lambda subject: {**given, **method.settings(subject)}


def _class_contender(name: str) -> Contender:
    """An edit's class as a contender, whose name says which version of its file it is."""
    with refusals():
        method, origin = find_method(name), origin_of(name)
    needed = [option.name for option in method.choices if option.default is REQUIRED]
    if needed:
        raise InputError(f"{name} needs {', '.join(needed)}, and a comparison takes its defaults: give them some")
    about = method.about.format(window="")
    return Contender(f"{name}@{str(origin['sha256'])[:8]}", about, lambda subject: {}, method=name)


#: Names of all contenders of UNets.
CONTENDERS = tuple(contender.name for contender in contenders())


def chosen(names: Sequence[str], self_replace: float = 0.8, kind: Served = "unet") -> tuple[Contender, ...]:
    """The contenders of these names, in their own order; all of them where no name is given.

    Args:
        names: of :func:`contenders`, or edits' classes as ``package.module:Class``, which come last.
        self_replace: share of the steps in which Free-Prompt-Editing replaces maps.
        kind: of model.

    Raises:
        InputError: an unknown name, or a class that cannot be imported or made.
    """
    classes = tuple(dict.fromkeys(name for name in names if names_a_class(name)))
    known = tuple(contender.name for contender in contenders(kind=kind))
    unknown = [name for name in names if name not in known and name not in classes]
    if unknown:
        raise InputError(
            f"unknown methods {', '.join(map(repr, unknown))}{'' if kind == 'unet' else f' of a {kind}'}; "
            f"{did_you_mean(unknown, known)}expected some of {', '.join(known)}, or an edit's class as "
            "package.module:Class"
        )
    shipped = tuple(c for c in contenders(self_replace, kind) if not names or c.name in names)
    return shipped + tuple(map(_class_contender, classes))
