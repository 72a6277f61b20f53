"""`fpe info`: versions, devices, attention backends, the embedded models and their words, what other models are served
and what they take where nothing is said, and the methods."""

from __future__ import annotations

import json
from typing import Any

from ..errors import InputError, refusals
from ..texts import print_text

__all__ = ["run"]


def run(method: str | None = None, *, as_json: bool = False) -> None:
    """Print what this installation can do; of a method, its options.

    Raises:
        InputError: there is no such method.
    """
    if method is not None:
        text = described(method)
        print_text(json.dumps({"method": method, "text": text}, indent=2) if as_json else text)
        return
    found = _found()
    if as_json:
        print_text(json.dumps(found, indent=2))
        return
    for name, version in found["versions"].items():
        print_text(f"{name:<14}{version or 'not installed'}")
    print_text(f"{'devices':<14}{', '.join(found['devices'])}")
    print_text("backends")
    for name, state in found["backends"].items():
        print_text(f"  {name:<12}{state}")
    print_text("models")
    for name, location in found["models"].items():
        print_text(f"  {name:<14}{location}")
    for title, names in found["words"].items():
        print_text(f"  {title:<12}{', '.join(names)}")
    print_text("other models, with what they take where nothing is said")
    width = max(map(len, found["families"])) + 2
    for name, own in found["families"].items():
        said = f"steps {own['steps']}, guidance {own['guidance']:g}, self-replace {own['self_replace'][1]:g}"
        print_text(f"  {name:<{width}}{said}; inverted by {', '.join(own['inversions'])}")
    print_text("methods (fpe info --method NAME says what their options do)")
    for name, entry in found["methods"].items():
        print_text(f"  {name:<16}{entry['title']}: {', '.join(entry['options'])}")


def _found() -> dict[str, Any]:
    import torch

    from fpe_kernels import backends

    from ..edits.registry import METHODS
    from ..embedded.scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS
    from ..models.sources import NAMES, find_model
    from ..runs.repeatable import versions

    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    models = {}
    for name in NAMES:
        try:
            models[name] = find_model(name).location
        except InputError as error:
            models[name] = str(error)
    return {
        "versions": versions(),
        "devices": [f"cpu ({torch.get_num_threads()} threads)", *cuda],
        "backends": backends(),
        "models": models,
        "words": {"objects": list(OBJECTS), "colours": list(COLOURS), "backgrounds": list(BACKGROUNDS)},
        "families": _families(),
        "methods": {name: {"title": entry.title, "options": list(entry.options)} for name, entry in METHODS.items()},
    }


def _families() -> dict[str, dict[str, Any]]:
    """By what a kind of model is called, what a run of one takes where nothing is said."""
    from ..models.served_families import FAMILIES
    from ..runs.settings import DEFAULTS

    found = {}
    for served in FAMILIES.values():
        kinds = {", distilled": served.of_distilled, ", Turbo": served.of_turbo}
        kinds = {"": {}, **{kind: of_it for kind, of_it in kinds.items() if of_it}}
        for kind, of_it in kinds.items():
            title = served.title + kind
            if title not in found:
                own = {**served.defaults, **of_it}
                usual = {name: own.get(name, getattr(DEFAULTS, name)) for name in ("steps", "guidance", "self_replace")}
                found[title] = {**usual, "inversions": list(served.inversions)}
    return found


def described(method: str) -> str:
    """A method and its options, a line each."""
    from ..edits.registry import find_method

    with refusals():
        return find_method(method).describe()
