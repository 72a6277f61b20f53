"""Tables of every method on generated and on real images, from what ``fpe evaluate --images`` wrote.

Kept by ``python -m benchmarks.quality methods FOLDER …``; the folders are evaluations of different images with the same
settings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fpe_pipeline.quality.intervals import INTERVALS
from fpe_pipeline.quality.methods.comparison_table import cell, inversion_table, method_table
from fpe_pipeline.quality.methods.subjects import GENERATED
from fpe_pipeline.quality.methods.tally import ALL, compare
from fpe_pipeline.quality.store import unpacked
from fpe_pipeline.runs.settings import INVERSIONS
from fpe_pipeline.texts import markdown_table

from .rows import ROOT, Row

__all__ = ["METHODS", "TABLES", "combined"]

METHODS = "methods"
RESULTS = ROOT / "benchmarks" / "results" / "quality"
_COMMAND = "fpe evaluate --images generated, fpe evaluate --images held-out"
# The way of inverting that stands beside generated images; the others have a table of their own.
_REFERENCE = "ddim"


def combined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One study of evaluations of different images.

    Raises:
        ValueError: two are of the same images, or they were made with different settings or packages.
    """
    first = results[0]
    for part, varies in (("settings", {"images"}), ("environment", set())):
        differing = {k for k in first[part] for r in results if k not in varies and first[part][k] != r[part][k]}
        if differing:
            raise ValueError(f"evaluations differ in {', '.join(sorted(differing))}: evaluate them with one setting")
    images = [result["settings"]["images"] for result in results]
    if len(set(images)) < len(images):
        raise ValueError(f"two evaluations are of the same images: {', '.join(images)}")
    rows = [row for result in results for row in result["scores"]["rows"]]
    whole = {**first, "settings": {**first["settings"], "images": images}, "scores": {**first["scores"], "rows": rows}}
    whole["summary"] = compare(unpacked(whole["scores"]), seed=first["settings"]["seed"])
    return whole


def full_table(rows: Sequence[Row]) -> str:
    """Every method and kind of edit, generated and real side by side; it has no use for ``rows``."""
    result = _read()
    if result is None:
        return _missing()
    about = [f"{name}: {text}" for name, text in result["settings"]["methods"].items()]
    table = method_table(result["summary"], (GENERATED, _REFERENCE))
    return f"{table}\n{_about(result)}\n*{'; '.join(about)}.*"


def short_table(rows: Sequence[Row]) -> str:
    """Success and structure of all kinds of edit together, for the front page."""
    result = _read()
    if result is None:
        return _missing()
    origins = [origin for origin in (GENERATED, _REFERENCE) if origin in result["summary"]]
    head = ["method"]
    for origin in origins:
        title = "generated" if origin == GENERATED else "real images"
        head += [f"{title}: edits", "succeed", "silhouettes' IoU"]
    lines = []
    tallies = [result["summary"][origin]["kinds"][ALL] for origin in origins]
    for method in dict.fromkeys(name for tally in tallies for name in tally):
        cells = []
        for tally in tallies:
            entry = tally.get(method)
            cells += [str(entry["edits"])] if entry else ["0"]
            cells += [cell(entry[name] if entry else None, name) for name in ("success", "iou")]
        lines.append([method, *cells])
    return markdown_table(head, lines) + "\n\n" + _about(result)


def inversions_table(rows: Sequence[Row]) -> str:
    """What each inversion gives back of a real image, what it takes, and Free-Prompt-Editing from there."""
    result = _read()
    return _missing() if result is None else inversion_table(result["summary"], INVERSIONS) + "\n" + _about(result)


TABLES = {METHODS: full_table, "methods-short": short_table, "methods-inversions": inversions_table}


def _about(result: dict[str, Any]) -> str:
    """What the study was made with, for a person."""
    settings, made = result["settings"], result["environment"]
    counted = "; ".join(
        f"{origin}: " + ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items())
        for origin, kinds in _subjects(result).items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in made.items() if name != "machine")
    on_cpu = settings["device"] == "cpu"
    clock = "processor time of all threads together" if on_cpu else f"elapsed time on {settings['device']}"
    return (
        f"*Held-out pairs ({counted}); real images are renders of the pairs' sources; {settings['steps']} steps, "
        f"guidance {settings['guidance']:g}, seed {settings['seed']}; {INTERVALS}; seconds of {clock}; "
        f"weights {settings['weights']}; {versions}*"
    )


def _subjects(result: dict[str, Any]) -> dict[str, dict[str, set[str]]]:
    """Names of the pictures by origin and kind of edit."""
    found: dict[str, dict[str, set[str]]] = {}
    for score in unpacked(result["scores"]):
        found.setdefault(score["origin"], {}).setdefault(score["kind"], set()).add(score["subject"])
    return found


def _missing() -> str:
    return f"*Every method on generated and real images: not measured yet (`{_COMMAND}`).*"


def _read() -> dict[str, Any] | None:
    path = RESULTS / f"{METHODS}.json"
    return json.loads(path.read_text()) if path.exists() else None
