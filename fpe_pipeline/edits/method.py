"""What a method is: a name for an edit, its options with their help, and what it needs of a picture to be compared."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..models.served_families import Served, titles
from ..texts import did_you_mean
from .base import Edit

__all__ = ["REQUIRED", "Make", "Method", "Option", "Served", "Unfit", "Wanted", "argument_help"]

Make = Callable[..., Edit]
#: The default of an option that has none.
REQUIRED = inspect.Parameter.empty
# What a method gives its edit itself, of the call that it is made for.
_OF_THE_CALL = ("prompts", "tokenizer")
_SERVED: dict[Served, str] = {
    "unet": "UNets",
    "transformer": f"transformers (of --model {titles('transformer')}; in Python see docs/write-an-adapter.md)",
}
# Characters of an option's help, after which it ends at the next comma before.
_LINE = 110


class Unfit(ValueError):
    """An edit that a method has no way of making; the message is the reason."""


class Wanted(Protocol):
    """What is known of an edit that methods are compared by."""

    @property
    def new_words(self) -> tuple[str, ...]:
        """Words of the target prompt that make the edit."""

    @property
    def region_words(self) -> tuple[str, str] | None:
        """A word of each prompt, (source, target), for the region that the edit is about."""

    @property
    def object_word(self) -> str | None:
        """The word of the source prompt whose outline is to be kept."""


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Args:
        name: as ``--option NAME=VALUE`` and ``make_edit(…, NAME=VALUE)`` spell it.
        default: what it is where it is left out; :data:`REQUIRED` where it must not be.
        about: its meaning in one line.
    """

    name: str
    default: Any = REQUIRED
    about: str = ""

    def __str__(self) -> str:
        default = "required" if self.default is REQUIRED else f"default: {_spelled(self.default)}"
        return f"{self.name}: {self.about} ({default})" if self.about else f"{self.name} ({default})"


def _no_settings(wanted: Wanted) -> Mapping[str, Any]:
    return {}


def _own_layers(unet: Any) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: what command lines call it.
        title: its name in pictures.
        about: its settings in words; ``{window}`` stands for the window that a comparison gives it.
        edit: the class of its edit, whose arguments are its options; their help is the class's docstring.
        make: a function of the prompts (the source's first), the tokenizer and options; None calls the class, with
            prompts and tokenizer where it has arguments of these names.
        further: options of ``make`` beside the edit's arguments, or in the place of some.
        taken: arguments of the edit that are no options, as ``make`` gives them itself.
        layers: options that choose layers for a model, as a function of its UNet; {} where the edit's own choice
            stands.
        settings: options for a picture that ``fpe evaluate`` compares methods on; raises :class:`Unfit` where the
            method cannot make that edit.
        window: the option that ``--self-replace`` sets; None where it is another method's.
        serves: the models whose layers it edits.
    """

    name: str
    title: str
    about: str
    edit: type[Edit]
    make: Make | None = None
    further: tuple[Option, ...] = ()
    taken: tuple[str, ...] = ()
    layers: Callable[[Any], Mapping[str, Any]] = _own_layers
    settings: Callable[[Wanted], Mapping[str, Any]] = _no_settings
    window: str | None = None
    serves: tuple[Served, ...] = ("unet",)

    @property
    def aligns(self) -> bool:
        """Whether it looks for words, and so cannot do without the tokenizer."""
        return "tokenizer" in inspect.signature(self.edit).parameters or any(o.name == "word" for o in self.further)

    @property
    def choices(self) -> tuple[Option, ...]:
        """Its options."""
        own, help_of = inspect.signature(self.edit).parameters, argument_help(self.edit)
        named = {option.name for option in self.further}
        left_out = {*named, *self.taken, *_OF_THE_CALL}
        made = (Option(n, given.default, help_of.get(n, "")) for n, given in own.items() if n not in left_out)
        return (*self.further, *made)

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(option.name for option in self.choices)

    def check_options(self, names: Sequence[str]) -> None:
        """Raise TypeError for options that it does not have, with what was meant."""
        unknown = [name for name in names if name not in self.options]
        if unknown:
            has = f"it has {', '.join(self.options)}" if self.options else "it has none"
            raise TypeError(
                f"{self.name} has no option {', '.join(unknown)}; {did_you_mean(unknown, self.options)}{has}"
            )

    def defaults(self, model: Any) -> dict[str, Any]:
        """Its options for a pipeline, its UNet or its transformer, beyond those that the edit has anyway."""
        inside = getattr(model, "unet", None) or getattr(model, "transformer", None) or model
        return dict(self.layers(inside)) if hasattr(inside, "down_blocks") else {}

    def edit_of(self, prompts: Sequence[str], tokenizer: Any, **options: Any) -> Edit:
        """Its edit of some prompts; a missing option is a TypeError."""
        if self.make is not None:
            return self.make(prompts, tokenizer, **options)
        wanted = inspect.signature(self.edit).parameters
        missing = [o.name for o in self.choices if o.default is REQUIRED and o.name not in options]
        if missing:
            raise TypeError(f"{self.name} needs the option {', '.join(missing)}")
        call = {"prompts": tuple(prompts), "tokenizer": tokenizer}
        return self.edit(**{name: value for name, value in call.items() if name in wanted}, **options)

    def describe(self) -> str:
        """The method and its options, a line each."""
        about = self.about.format(window="in the window's steps")
        served = f"  of {' and '.join(_SERVED[model] for model in self.serves)}"
        return "\n".join([f"{self.name}: {self.title}, {about}", served, *(f"  {option}" for option in self.choices)])


def argument_help(kind: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of its arguments, each in a line.

    An entry's first sentence, up to a semicolon. Where an entry is about several arguments, what a base says of each of
    them goes before it.
    """
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        for names, text in _entries(vars(each).get("__doc__") or ""):
            for name in names:
                found[name] = found[name] if len(names) > 1 and name in found else _in_a_line(text)
    return found


def _entries(docstring: str) -> Iterator[tuple[list[str], str]]:
    """The names and the text of each entry of a docstring's arguments."""
    names, text = "", ""
    for line in [*inspect.cleandoc(docstring).partition("\nArgs:\n")[2].splitlines(), "end"]:
        entry = re.match(r" {4}((?:\w+, )*\w+): (.*)", line)
        if names and (entry or not line.startswith("    ")):
            yield names.split(", "), text
            names = ""
        if not line.startswith("    "):
            if line:
                return
        elif entry:
            names, text = entry[1], entry[2]
        else:
            text += f" {line.strip()}"


def _in_a_line(text: str) -> str:
    first = re.split(r"\. |; |\.$", text.strip())[0]
    plain = re.sub(r":\w+:`~?\.?([^`]*)`", r"\1", first).replace("``", "")
    if len(plain) <= _LINE:
        return plain
    whole = plain[:_LINE]
    return whole[: max(whole.rfind(", "), whole.rfind(": "), whole.rfind(" ("))]


def _spelled(value: Any) -> str:
    """A default as ``--option`` reads it, which is as JSON."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        return repr(value)
