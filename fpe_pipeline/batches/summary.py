"""What a batch says of itself at the end: a table of its jobs, one of means, and a plot."""

from __future__ import annotations

import csv
import importlib.util
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic_folder import staged
from ..texts import markdown_table

__all__ = ["KINDS", "Line", "means", "write_summary"]

_FIGURES = 4
_ALL, _NONE = "all", "no kind"
#: Kinds that the table of means has of its own.
KINDS = (_ALL, _NONE)


@dataclass(frozen=True)
class Line:
    """A job, and what came of it.

    Args:
        name, kind, source, target: of the job; of a row that is none, its number alone.
        file: its picture, from the batch's folder on; empty where there is none.
        failed: why not.
        measures: by name.
        seconds: that it took.
    """

    name: str
    kind: str = ""
    source: str = ""
    target: str = ""
    file: str = ""
    failed: str = ""
    measures: dict[str, float | None] = field(default_factory=dict)
    seconds: float | None = None


def means(lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    """By kind, and of all, the mean of every measure over the jobs that have it, with their number as ``jobs``."""
    made = [line for line in lines if not line.failed]
    kinds = list(dict.fromkeys(line.kind for line in made))
    groups = {kind or _NONE: [line for line in made if line.kind == kind] for kind in kinds if len(kinds) > 1}
    return {kind: _means(members) for kind, members in {**groups, _ALL: made}.items() if members}


def write_summary(folder: Path, lines: Sequence[Line]) -> list[Path]:
    """Write summary.csv, summary.md and, where matplotlib is installed and there is something to plot, summary.png.

    Returns:
        Their paths.
    """
    names = _names(lines)
    with staged(folder) as stage:
        (stage / "summary.csv").write_text(_table(lines, names), encoding="utf-8", errors="backslashreplace")
        (stage / "summary.md").write_text(_markdown(lines), encoding="utf-8", errors="backslashreplace")
        if names and importlib.util.find_spec("matplotlib") is not None:
            _plot(lines, names, stage / "summary.png")
        written = sorted(path.name for path in stage.iterdir())
    return [folder / name for name in written]


def _means(lines: Sequence[Line]) -> dict[str, float]:
    found: dict[str, float] = {"jobs": len(lines)}
    for name in _names(lines):
        found[name] = statistics.fmean(_values(lines, name))
    return found


def _names(lines: Sequence[Line]) -> list[str]:
    names = dict.fromkeys(name for line in lines for name in line.measures)
    return [name for name in names if _values(lines, name)]


def _values(lines: Sequence[Line], name: str) -> list[float]:
    return [value for line in lines if (value := line.measures.get(name)) is not None]


def _table(lines: Sequence[Line], names: Sequence[str]) -> str:
    file = io.StringIO()
    write = csv.writer(file, lineterminator="\n")
    write.writerow(["job", "kind", "source", "target", "file", "failed", "seconds", *names])
    for line in lines:
        row: list[Any] = [line.name, line.kind, line.source, line.target, line.file, line.failed, line.seconds]
        write.writerow([*row, *(line.measures.get(name) for name in names)])
    return file.getvalue()


def _markdown(lines: Sequence[Line]) -> str:
    failed = [line for line in lines if line.failed]
    table = means(lines)
    names = _names(lines)
    rows = [
        [kind, str(int(found["jobs"])), *(f"{found[name]:.{_FIGURES}g}" if name in found else "–" for name in names)]
        for kind, found in table.items()
    ]
    text = f"{len(lines) - len(failed)} of {len(lines)} jobs made\n"
    if rows:
        text += "\n" + markdown_table(["kind", "jobs", *names], rows) + "\n"
    if failed:
        text += "\n" + markdown_table(["failed", "why"], [[line.name, line.failed] for line in failed], words=2) + "\n"
    return text


def _plot(lines: Sequence[Line], names: Sequence[str], path: Path) -> None:
    """A panel for each measure, a row of it for each kind: every job a dot, the mean a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(line.kind for line in lines if not line.failed))
    figure = Figure(figsize=(7, 0.6 + len(names) * (0.55 + 0.3 * len(kinds))), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for panel, name in zip(panels, names, strict=True):
        for row, kind in enumerate(kinds):
            values = _values([line for line in lines if line.kind == kind], name)
            if values:
                panel.plot(values, [row] * len(values), "o", markersize=3, alpha=0.5)
                panel.plot([statistics.fmean(values)] * 2, [row - 0.3, row + 0.3], "k-", linewidth=1.5)
        panel.set_yticks(range(len(kinds)), [kind or _ALL for kind in kinds])
        panel.set_ylim(len(kinds) - 0.4, -0.6)
        panel.set_title(name, loc="left", fontsize="small")
        panel.tick_params(labelsize="small")
    # Without matplotlib's own text beside it, the same figures give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
