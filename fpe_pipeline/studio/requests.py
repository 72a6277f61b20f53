"""From what stands in the page's fields to settings of a run, and back.

Whoever can reach the page can send it anything, in a field or in a picture's record. What a page may ask for is
therefore narrower than what a command line may: methods of the table alone (a class by name would import a file), the
models that the server was started with, no path of a picture, and numbers within :class:`Limits`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..edits.method import REQUIRED, Option
from ..edits.registry import METHODS
from ..errors import InputError
from ..runs.option_files import OPTION_FILES
from ..runs.settings import DEFAULTS, SELF_REPLACE, Settings
from .prompts import FIRST

__all__ = [
    "FIELDS",
    "MOST_OPTIONS",
    "Limits",
    "defaults",
    "fields_of",
    "fields_read",
    "first_fields",
    "new_seed",
    "options_of",
    "restorable",
    "settings_of",
    "within",
]

#: What the page has fields for, by the names of the settings.
FIELDS = (
    "source", "targets", "negative", "method", "self_replace", "layers", "seed", "steps", "guidance", "size",
    "control",
)  # fmt: skip
#: As many fields for options as the method with the most has.
MOST_OPTIONS = max(len(method.choices) for method in METHODS.values())
_SEEDS = 2**31
#: Seeds that a browser has: its numbers are doubles, and a larger one would come back as a neighbour of it.
_EXACT = 2**53
#: Denoising steps of a new page: enough to see what comes of it.
_STEPS = 25
_ELSEWHERE = "repeat these settings by fpe edit --from"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Args:
        steps: denoising steps.
        targets: prompts to edit into.
        letters: of a prompt.
        pixels: width × height of an image.
        guidance: from, to.
    """

    steps: int = 200
    targets: int = 8
    letters: int = 2000
    pixels: int = 2048 * 2048
    guidance: tuple[float, float] = (0.0, 20.0)


def fields_read(values: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    """The model and the fields by name, from values in the page's order: the model, :data:`FIELDS`, the options."""
    model, *rest = values
    fields = dict(zip(FIELDS, rest, strict=False))
    method = str(fields["method"])
    known = options_of(method) if method in METHODS else ()
    fields["options"] = {o.name: text for o, text in zip(known, rest[len(FIELDS) :], strict=False)}
    return str(model), fields


def settings_of(fields: Mapping[str, Any], model: str, *, image: str | None = None, **machine: Any) -> Settings:
    """The settings that the page's fields add up to.

    Args:
        fields: by the names of :data:`FIELDS`, and ``options``: a method's options as they were typed, by name.
        model: one of the server's.
        image: path of the visitor's own photo, which the server wrote.
        machine: device, dtype and backend of the server.

    Raises:
        InputError: what is wrong, in one line.
    """
    method = str(fields["method"])
    if method not in METHODS:
        raise InputError(f"the method is one of {', '.join(METHODS)}, got {method!r}")
    window = tuple(float(end) for end in fields["self_replace"])
    layers = tuple(fields.get("layers") or ())
    levels = tuple(int(name.removeprefix("level ")) for name in layers if name.startswith("level "))
    blocks = tuple(name for name in layers if not name.startswith("level "))
    if levels and blocks:
        raise InputError("choose levels or blocks, not both: a level is in several blocks")
    return Settings(
        source=str(fields["source"] or "").strip(),
        targets=[line.strip() for line in str(fields["targets"] or "").splitlines() if line.strip()],
        negative=str(fields.get("negative") or "").strip() or None,
        model=model,
        seed=_whole(fields["seed"], "seed") or 0,
        steps=_whole(fields["steps"], "steps"),
        guidance=float(fields["guidance"]),
        method=method,
        self_replace=window if METHODS[method].window is not None else SELF_REPLACE,
        levels=levels or None,
        layers=blocks or None,
        options=_options(method, fields.get("options") or {}),
        size=_size(str(fields.get("size") or "")),
        image=image,
        control=bool(fields.get("control", True)),
        **{name: fields[name] for name in ("inversion",) if fields.get(name)},
        **machine,
    )


def within(settings: Settings, limits: Limits) -> Settings:
    """The settings; raises InputError where they ask for more than the page gives."""
    if files := settings.options.keys() & set(OPTION_FILES):
        raise InputError(f"the page takes no {', '.join(sorted(files))}: it names a file of the server's")
    prompts = (settings.source, *settings.targets, settings.negative or "")
    width, height = settings.size or (0, 0)
    asked = (
        (settings.steps, limits.steps, "steps"),
        (len(settings.targets), limits.targets, "targets"),
        (max(map(len, prompts)), limits.letters, "letters in a prompt"),
        (width * height, limits.pixels, "pixels"),
    )
    for count, most, what in asked:
        if count > most:
            raise InputError(f"this page makes at most {most:,} {what}, got {count:,}")
    low, high = limits.guidance
    if not low <= settings.guidance <= high:
        raise InputError(f"this page takes guidance from {low:g} (none) to {high:g}, got {settings.guidance:g}")
    if settings.seed >= _EXACT:
        raise InputError(f"a browser has whole numbers below {_EXACT:,} only, got seed {settings.seed}")
    return settings


def restorable(settings: Settings, layers: Collection[str]) -> dict[str, Any]:
    """The fields of settings from elsewhere, which add up to these very settings again.

    Args:
        settings: of any run; of a photo, ``image`` is set.
        layers: that the page offers of the settings' model.

    Raises:
        InputError: settings that no fields say: a limit of tokens, layers that are not offered, a line break in a
            target, or numbers of an inversion.
    """
    settings = settings.with_values(  # blanks around a prompt are none of its tokens
        source=settings.source.strip(),
        targets=[target.strip() for target in settings.targets],
        negative=(settings.negative or "").strip() or None,
    )
    fields = fields_of(settings)
    if unknown := [name for name in fields["layers"] if name not in layers]:
        raise InputError(
            f"the page offers the layers {', '.join(layers)}; these settings have {', '.join(unknown)}; {_ELSEWHERE}"
        )
    machine = {name: getattr(settings, name) for name in ("device", "dtype", "backend")}
    asked = fields | {"inversion": settings.inversion}
    said = settings_of(asked, settings.model, image=settings.image, **machine).model_dump()
    left_out = {"threads"} | (set() if METHODS[settings.method].window else {"self_replace"})
    if settings.image is None:
        left_out |= {"inversion_guidance", "inner_steps", "early_stop"}
    lost = {n: v for n, v in settings.model_dump().items() if n not in left_out and v != said[n]}
    if lost:
        raise InputError(f"the page has no field for {', '.join(f'{n}={v!r}' for n, v in lost.items())}; {_ELSEWHERE}")
    return fields


def fields_of(settings: Settings) -> dict[str, Any]:
    """What stands in the page's fields for some settings: the inverse of :func:`settings_of`.

    Raises:
        InputError: a method that is not in the table, or a limit of tokens, for which the page has no field.
    """
    if settings.method not in METHODS:
        raise InputError(f"the page knows the methods {', '.join(METHODS)}; these settings have {settings.method!r}")
    if settings.max_tokens is not None:
        raise InputError(f"the page has no field for max_tokens; {_ELSEWHERE}")
    layers = [f"level {level}" for level in settings.levels or ()] + [str(layer) for layer in settings.layers or ()]
    return {
        "source": settings.source,
        "targets": "\n".join(settings.targets),
        "negative": settings.negative or "",
        "method": settings.method,
        "self_replace": list(settings.self_replace),
        "layers": layers,
        "seed": settings.seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "size": f"{settings.size[0]} x {settings.size[1]}" if settings.size else "",
        "control": settings.control,
        "options": {name: _spelled(value) for name, value in settings.options.items()},
    }


def options_of(method: str) -> tuple[Option, ...]:
    """The options of a method that a page gives and that have no field of their own."""
    entry = METHODS[method]
    left_out = {entry.window, "levels", "layers", "max_tokens", *OPTION_FILES}
    return tuple(option for option in entry.choices if option.name not in left_out)


def new_seed() -> int:
    """What the dice shows."""
    return random.SystemRandom().randrange(_SEEDS)


def _options(method: str, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they were typed: JSON or, where it is none, text; an empty field is the default."""
    known = {option.name for option in options_of(method)}
    if unknown := typed.keys() - known:
        raise InputError(f"the page has no option {', '.join(sorted(unknown))} of {method}")
    found: dict[str, Any] = {}
    for name, text in typed.items():
        if str(text or "").strip():
            try:
                found[name] = json.loads(text)
            except json.JSONDecodeError:
                found[name] = str(text).strip()
    lacking = [o.name for o in options_of(method) if o.default is REQUIRED and o.name not in found]
    if lacking:
        raise InputError(f"{method} needs {', '.join(lacking)}: open its options and fill it in")
    return found


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) and not _is_json(value) else json.dumps(value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _whole(value: Any, name: str) -> int | None:
    if value in (None, ""):
        return None
    if float(value) != int(value):
        raise InputError(f"{name} must be a whole number, got {value}")
    return int(value)


def _size(text: str) -> tuple[int, int] | None:
    """``512 x 768`` as (width, height); nothing is the model's own."""
    sides = re.fullmatch(r"\s*(\d{1,6})\s*[x×, ]\s*(\d{1,6})\s*", text.lower())
    if text.strip() and sides is None:
        raise InputError(f"expected a size such as 512 x 768, or nothing for the model's own, got {text.strip()!r}")
    return None if sides is None else (int(sides[1]), int(sides[2]))


def first_fields(model: str = DEFAULTS.model) -> dict[str, Any]:
    """What stands in the fields of a new page, with prompts that the embedded model draws well."""
    return defaults(FIRST, model) | {"steps": _STEPS}


def defaults(prompts: Sequence[str] = (), model: str = DEFAULTS.model) -> dict[str, Any]:
    """What stands in the fields for some prompts and a model's own defaults."""
    source, *targets = prompts or ("",)
    return fields_of(Settings.of_model(source=source, targets=tuple(targets), model=model))
