"""The comparison for a person: one row for each kind of edit and method, origins side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...texts import markdown_table
from .subjects import GENERATED
from .tally import ALL

__all__ = ["cell", "inversion_table", "method_table"]

# The method that stands for edits from an inversion.
_EDIT = "fpe"
_COLUMNS = (("succeeds", "success"), ("IoU", "iou"), ("PSNR outside, dB", "outside_psnr"), ("s", "seconds"))


def method_table(
    summary: Mapping[str, Any], origins: Sequence[str] | None = None, kinds: Sequence[str] | None = None
) -> str:
    """Markdown; 95 % intervals in brackets. A method that cannot make an edit stands there with the reason;
    where it can make some, the reasons follow the table.

    Args:
        summary: as :func:`~.tally.compare` gives it.
        origins: in this order, of those that there are (default: all).
        kinds: of edits, likewise; the first kind of a comparison is all of them together.
    """
    shown = [origin for origin in (origins or summary) if origin in summary]
    every = dict.fromkeys(kind for origin in shown for kind in summary[origin]["kinds"])
    chosen = [kind for kind in (kinds or every) if kind in every]
    # Where all edits are of one kind, the same row twice would say nothing.
    chosen = [kind for kind in chosen if kind != ALL or len(chosen) == 1 or len(every) > 2]
    head = ["edit", "method"]
    for origin in shown:
        title = "generated" if origin == GENERATED else f"real, {origin}"
        head += [f"{title}: edits", *(name for name, _ in _COLUMNS)]
    lines, notes = [], []
    for kind in chosen:
        tallies = [summary[origin]["kinds"].get(kind, {}) for origin in shown]
        for method in dict.fromkeys(name for tally in tallies for name in tally):
            cells = [text for tally in tallies for text in _cells(tally.get(method))]
            lines.append([kind, method, *cells])
            reasons = {reason for tally in tallies if method in tally for reason in _partly(tally[method])}
            notes += [f"- {kind}, {method}: not every edit was made: {reason}" for reason in sorted(reasons)]
    return markdown_table(head, lines, words=2) + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")


def _cells(entry: Mapping[str, Any] | None) -> list[str]:
    if entry is None:
        return ["0", *("–" for _ in _COLUMNS)]
    if not entry["edits"]:
        return ["0", "; ".join(entry["reasons"]), *("–" for _ in _COLUMNS[1:])]
    edits = f"{entry['edits']} of {entry['asked']}" if _partly(entry) else str(entry["edits"])
    return [edits, *(cell(entry[figure], figure) for _, figure in _COLUMNS)]


def _partly(entry: Mapping[str, Any]) -> list[str]:
    """Why some of a method's edits are missing, where others were made."""
    return entry["reasons"] if entry["edits"] else []


def inversion_table(summary: Mapping[str, Any], origins: Sequence[str] | None = None) -> str:
    """Markdown: what each inversion gives back of real images, beside what the autoencoder alone does; what it takes;
    and Free-Prompt-Editing from there.

    Args:
        summary: as :func:`~.tally.compare` gives it.
        origins: in this order, also those that were not measured (default: all that were).
    """
    head = ["inversion", "real images", "reconstruction, dB", "lowest", "autoencoder alone, dB", "lowest"]
    head += ["s to invert", "FPE edits", "succeed", "IoU", "PSNR outside, dB"]
    lines = []
    for origin in origins or [name for name in summary if name != GENERATED]:
        whole = summary.get(origin)
        if whole is None:
            lines.append([origin, "0", "not measured yet", *("–" for _ in head[3:])])
            continue
        edit = whole["kinds"][ALL].get(_EDIT)
        cells = [str(whole["pictures"])]
        for name in ("reconstruction", "autoencoder"):
            cells += [cell(whole[name], name), f"{whole[name]['minimum']:.2f}" if whole[name] else "–"]
        cells += [cell(whole["inversion_seconds"], "inversion_seconds"), str(edit["edits"]) if edit else "0"]
        cells += [cell(edit[name] if edit else None, name) for name in ("success", "iou", "outside_psnr")]
        lines.append([origin, *cells])
    return markdown_table(head, lines) + "\n"


def cell(figure: Mapping[str, float] | None, name: str) -> str:
    """A mean with its interval, in the figure's unit; a dash where nothing was measured."""
    if figure is None:
        return "–"
    if name == "success":
        return f"{100 * figure['mean']:.0f} % [{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]"
    form = ".2f" if name in ("iou", "seconds", "inversion_seconds") else ".1f"
    if name.endswith("seconds"):
        return f"{figure['mean']:{form}}"
    return f"{figure['mean']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"
