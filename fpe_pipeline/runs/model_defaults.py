"""What a run takes where nothing is said, by the kind of model, and what a kind of model cannot be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ..errors import InputError
from ..models.served_families import Served
from ..models.sources import ModelSource, find_model

__all__ = [
    "Asked",
    "check_family",
    "check_guidance_of",
    "check_source_of",
    "default_in_words",
    "defaults_for",
]

_KINDS: dict[Served, str] = {"unet": "UNets", "transformer": "transformers"}
# Settings that choose a UNet's layers.
_OF_UNETS = ("levels", "max_tokens")


class Asked(Protocol):
    """What :func:`check_family` reads of a run's settings, which are :class:`~.settings.Settings`."""

    @property
    def model(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def image(self) -> str | None: ...
    @property
    def inversion(self) -> str: ...
    @property
    def negative(self) -> str | None: ...
    @property
    def guidance(self) -> float: ...


def defaults_for(model: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of settings that are the model's own, beside those that are given.

    Args:
        model: its name; None for the default one.
        given: what is said already.

    Returns:
        Nothing for a UNet, whose defaults are those of :class:`~.settings.Settings`, and for a model whose kind only
        loading would tell.

    Raises:
        InputError: there is no such model.
    """
    if model is None:
        return {}
    own = {name: value for name, value in find_model(model).defaults.items() if name not in given}
    if not own:
        return {}
    from ..edits.registry import METHODS  # with torch, which refusals do without

    method = METHODS.get(given.get("method", "fpe"))
    if method is None or method.window is None:  # a window of its own
        own.pop("self_replace", None)
    return own


def default_in_words(usual: float) -> str:
    """What a setting is where nothing is said, as help says it: of Stable Diffusion, and who says those of others."""
    return f"default: {usual:g}, or the model's own: fpe info lists them"


def check_family(settings: Asked, source: ModelSource) -> None:
    """Raise InputError for what a kind of model cannot be asked for.

    Args:
        settings: of the run.
        source: of its model; of one whose family only loading tells, nothing is known yet.
    """
    from ..edits.registry import find_method, methods_of

    if source.family is None:
        return
    model, served = f"model '{settings.model}'", source.served
    method = find_method(settings.method)
    if served.kind not in method.serves:
        raise InputError(
            f"{settings.method} edits {' and '.join(_KINDS[each] for each in method.serves)}, and {model} is "
            f"{served.words}; its methods are {', '.join(methods_of(served.kind))}"
        )
    asked = [name for name in _OF_UNETS if getattr(settings, name) is not None]
    if asked and not served.is_unet:
        raise InputError(
            f"{' and '.join(f'--{name}' for name in asked).replace('_', '-')} choose layers of a UNet, and {model} is "
            f"{served.words}, all of whose layers are of one size; choose with --layers"
        )
    check_source_of(settings, source)


def check_source_of(settings: Asked, source: ModelSource) -> None:
    """The same of what decides the source, whatever it is edited by."""
    if source.family is None:
        return
    model, served = f"model '{settings.model}'", source.served
    if settings.image is not None and settings.inversion not in served.inversions:
        raise InputError(
            f"inversion {settings.inversion} is not one of {model}, {served.words}; it has "
            f"{', '.join(served.inversions)}"
        )
    if served.no_negative is not None and settings.negative is not None:
        raise InputError(f"{model} is {served.words}, {served.no_negative}; leave --negative out")
    check_guidance_of(settings.model, source, settings.guidance)


def check_guidance_of(model: str, source: ModelSource, guidance: float) -> None:
    """Raise InputError for guidance that a model, by its name and what is known of it, would take no notice of."""
    said = source.served.distilled
    if said is None or said.hears_guidance:
        return
    if source.is_distilled and guidance > source.served.unguided:
        raise InputError(
            f"model '{model}' was distilled to be without guidance, and would take no notice of --guidance "
            f"{guidance:g}; leave it out, or pass --guidance {source.served.unguided:g} where an earlier run brings it"
        )
