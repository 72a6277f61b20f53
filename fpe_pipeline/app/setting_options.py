"""How each setting of a run is written on the command line; every command that takes one takes it so."""

from __future__ import annotations

from typing import Any

from ..runs.model_defaults import default_in_words
from ..runs.settings import DEFAULTS, DTYPE_NAMES, INVERSIONS, SELF_REPLACE, Settings
from .options import as_integers, as_layers, as_name_and_value, as_size, as_window, field, flag

__all__ = ["BACKEND", "DEVICE", "DTYPE", "IN_WORDS", "JSON", "QUIET", "TRACEBACK", "setting"]

#: Defaults that some models have of their own.
IN_WORDS = {
    name: default_in_words(usual)
    for name, usual in (("steps", DEFAULTS.steps), ("guidance", DEFAULTS.guidance), ("self_replace", SELF_REPLACE[1]))
}

_MACHINE = "Machine"
#: By field of `Settings`, options of `typer.Option` and of `field`; ``flags`` where its name is not the field's.
_WRITTEN: dict[str, dict[str, Any]] = {
    "source": {"metavar": "TEXT"},
    "targets": {"flags": ("--target",), "metavar": "TEXT", "note": "repeat for more"},
    "negative": {"metavar": "TEXT", "note": "default: nothing"},
    "image": {"metavar": "PATH"},
    "inversion": {"metavar": "NAME", "autocompletion": lambda: INVERSIONS},
    "inversion_guidance": {"metavar": "SCALE"},
    "inner_steps": {"metavar": "N"},
    "early_stop": {"metavar": "ERROR"},
    "method": {"metavar": "NAME"},
    "options": {"flags": ("--option",), "metavar": "NAME=VALUE", "parser": as_name_and_value},
    "self_replace": {"metavar": "END", "parser": as_window},
    "levels": {"metavar": "N,N", "parser": as_integers},
    "max_tokens": {"metavar": "N"},
    "layers": {"metavar": "PATH,PATH", "parser": as_layers},
    "model": {"metavar": "PATH", "note": "default: the embedded model"},
    "seed": {"metavar": "N"},
    "steps": {"metavar": "N", "note": IN_WORDS["steps"]},
    "guidance": {"metavar": "SCALE", "note": IN_WORDS["guidance"]},
    "size": {"metavar": "WxH", "note": "default: the model's", "parser": as_size},
    "threads": {"metavar": "N"},
    "device": {"metavar": "NAME", "note": "default: cuda where there is one, else cpu"},
    "dtype": {
        "metavar": "NAME",
        "note": f"{', '.join(DTYPE_NAMES)}; default: float16, or bfloat16 where that overflows, on cuda, else float32",
        "autocompletion": lambda: DTYPE_NAMES,
    },
    "backend": {"metavar": "NAME", "note": "`fpe info` lists them; default: auto"},
}


def setting(name: str, *, panel: str, **different: Any) -> Any:
    """The option of a field of `Settings`.

    Args:
        name: of the field.
        panel: the group in which the help shows it.
        different: what is said otherwise here than by other commands, such as a ``note``.
    """
    options = {**_WRITTEN[name], **different}
    return field(Settings, name, *options.pop("flags", ()), panel=panel, **options)


DEVICE, DTYPE, BACKEND = (setting(name, panel=_MACHINE) for name in ("device", "dtype", "backend"))
JSON = flag("--json", panel=_MACHINE, text="say what came of it as one JSON object on standard output")
QUIET = flag("--quiet", panel=_MACHINE, text="no progress on standard error")
TRACEBACK = flag("--traceback", panel=_MACHINE, text="show the Python traceback of an error")
