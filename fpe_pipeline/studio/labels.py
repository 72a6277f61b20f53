"""What the page calls its fields, and refusals in these words: they are the command's too, and name its options."""

from __future__ import annotations

import re

__all__ = ["LABELS", "in_fields"]

#: By the names of the settings.
LABELS = {
    "source": "Source prompt",
    "targets": "Targets, one a line",
    "negative": "Negative prompt",
    "model": "Model",
    "method": "Method",
    "layers": "Layers (none: the method's own)",
    "seed": "Seed",
    "steps": "Steps",
    "guidance": "Guidance",
    "size": "Width x height, px",
    "inversion": "How the source is held to the photo",
}
#: What the command calls otherwise; a UNet's levels are among the page's layers.
_OPTIONS = {"target": "targets", "levels": "layers"}
_OPTION = re.compile(r"(?P<verb>pass |leave )?--(?P<name>[a-z]+)(?P<out> out)?")
_INVERSION = re.compile(r"(?:pass )?--inversion ([a-z]+)")
#: As Python is told to choose layers.
_LAYERS = re.compile(r"(pass )?(?:levels=, max_tokens= or )?\blayers=(?:, indices or paths,?)?")


def in_fields(text: str) -> str:
    """A refusal that names fields of the page, where it names options of the command or arguments of Python.

    Options that the page has no field for, such as those of the server, stay as they are. Layers to choose from, which
    stand in their field, are left out.
    """
    said = _INVERSION.sub(lambda found: f"set {_named('inversion')} to {found[1]}", text)
    said = _OPTION.sub(_field, said)
    first, *_ = _LAYERS.sub(_chosen_layers, said).splitlines() or [""]
    return first if _LAYERS.search(said) else said


def _field(found: re.Match[str]) -> str:
    name = _OPTIONS.get(found["name"], found["name"])
    if name not in LABELS:
        return found[0]
    if found["verb"] == "leave " and found["out"]:
        return f"leave {_named(name)} empty"
    return f"{'fill in ' if found['verb'] == 'pass ' else found['verb'] or ''}{_named(name)}{found['out'] or ''}"


def _chosen_layers(found: re.Match[str]) -> str:
    return f"{'choose ' if found[1] else ''}{_named('layers')}"


def _named(name: str) -> str:
    """A field by what stands above it, without what that says beside the name."""
    return f"“{re.split('[,(]', LABELS[name])[0].strip()}”"
