"""What a run takes where nothing is said, by the kind of model, and what a kind of model cannot be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

from ..errors import InputError
from ..models.loading import Family, ModelSource, find_model

__all__ = [
    "FLOW_INVERSIONS",
    "FLOW_WINDOW",
    "UNET_INVERSIONS",
    "Asked",
    "check_family",
    "check_source_of",
    "default_in_words",
    "defaults_for",
    "inversions_of",
    "served_by",
]

_OfUNets = Literal["ddim", "direct", "null-text", "negative-prompt"]
_OfFlows = Literal["direct", "reference", "free"]
#: How models of each kind invert pictures, the default first; those of `fpe_pipeline.inversion`, which takes seconds to
#: import.
UNET_INVERSIONS: tuple[_OfUNets, ...] = get_args(_OfUNets)
FLOW_INVERSIONS: tuple[_OfFlows, ...] = get_args(_OfFlows)
#: The steps in which Shin et al. replace maps of joint attention.
FLOW_WINDOW = (0.0, 0.2)
_FLOW = {"self_replace": FLOW_WINDOW, "inversion": "direct", "steps": 28}
_DEFAULTS: dict[Family, dict[str, Any]] = {
    "unet": {},
    "sdxl": {"guidance": 5.0},
    "sd3": {**_FLOW, "guidance": 7.0},
    "flux": {**_FLOW, "guidance": 3.5},
}
_WORDS: dict[Family, str] = {
    "unet": "a UNet",
    "sdxl": "a UNet of SDXL's kind",
    "sd3": "a transformer of Stable Diffusion 3's kind",
    "flux": "a transformer of FLUX.1's kind",
}
_SHORT: dict[Family, str] = {"sdxl": "SDXL", "sd3": "Stable Diffusion 3", "flux": "FLUX.1"}
_KINDS = {"unet": "UNets", "transformer": "transformers"}
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
    family = find_model(model).family or "unet"
    own = {name: value for name, value in _DEFAULTS[family].items() if name not in given}
    if not own:
        return {}
    from ..edits.registry import METHODS  # with torch, which refusals do without

    method = METHODS.get(given.get("method", "fpe"))
    if method is None or method.window is None:  # a window of its own
        own.pop("self_replace", None)
    return own


def default_in_words(name: str, usual: float) -> str:
    """What a setting is where nothing is said, as help says it: ``usual``, then that of the models which differ."""
    others: dict[float, list[str]] = {}
    for family, model in _SHORT.items():
        if name in _DEFAULTS[family]:
            value = _DEFAULTS[family][name]
            others.setdefault(value[1] if isinstance(value, tuple) else value, []).append(model)
    told = ", ".join(f"{' and '.join(models)}: {value:g}" for value, models in others.items())
    return f"default: {usual:g}" + (f"; {told}" if told else "")


def served_by(family: Family) -> Literal["unet", "transformer"]:
    """What methods call a kind of model."""
    return "unet" if family in ("unet", "sdxl") else "transformer"


def inversions_of(family: Family) -> tuple[str, ...]:
    """How a kind of model inverts pictures, the default first."""
    return UNET_INVERSIONS if served_by(family) == "unet" else FLOW_INVERSIONS


def check_family(settings: Asked, source: ModelSource, family: Family | None = None) -> None:
    """Raise InputError for what a kind of model cannot be asked for.

    Args:
        settings: of the run.
        source: where its model is.
        family: where loading has told what ``source`` does not say.
    """
    from ..edits.registry import find_method, methods_of

    family = family or source.family
    if family is None:
        return
    model, kind = f"model '{settings.model}'", served_by(family)
    method = find_method(settings.method)
    if kind not in method.serves:
        raise InputError(
            f"{settings.method} edits {' and '.join(_KINDS[each] for each in method.serves)}, and {model} is "
            f"{_WORDS[family]}; its methods are {', '.join(methods_of(kind))}"
        )
    asked = [name for name in _OF_UNETS if getattr(settings, name) is not None]
    if asked and kind != "unet":
        raise InputError(
            f"{' and '.join(f'--{name}' for name in asked).replace('_', '-')} choose layers of a UNet, and {model} is "
            f"{_WORDS[family]}, all of whose layers are of one size; choose with --layers"
        )
    check_source_of(settings, source, family)


def check_source_of(settings: Asked, source: ModelSource, family: Family | None = None) -> None:
    """The same of what decides the source, whatever it is edited by."""
    family = family or source.family
    if family is None:
        return
    model, known = f"model '{settings.model}'", inversions_of(family)
    if settings.image is not None and settings.inversion not in known:
        raise InputError(
            f"inversion {settings.inversion} is not one of {model}, {_WORDS[family]}; it has {', '.join(known)}"
        )
    if family == "flux" and settings.negative is not None:
        raise InputError(
            f"{model} is {_WORDS[family]}, which is told its guidance and has no unconditional half; leave --negative "
            "out"
        )
