"""The figures, each a function from rows to a drawing, or to None where its rows are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .cases import Case, headline_cases
from .cost import Ceilings
from .providers import case_label
from .report import our_row
from .rows import Ratio, Row
from .table_parts import DENSE, MEMORY_LIMIT, TITLES, UNEDITED, grouped
from .tables import holdings, law
from .unets import COMPILED, GRAPH, UNetCase

OURS, OTHER, BAD = "#1b6ca8", "#9aa5b1", "#c2452d"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    # The same rows give the same file.
    "svg.hashsalt": "fpe-kernels",
}


def speed(rows: Sequence[Row], gpu: bool) -> Any:
    """Headline cases: how many times longer everyone takes than we do."""
    cases = grouped(rows, "kernels", gpu)
    found = [(case, cases[case.name]) for case in headline_cases() if case.name in cases]
    if not found:
        return None
    figure, axes = plt.subplots(1, len(found), figsize=(4.6 * len(found), 3.2), squeeze=False)
    for axis, (case, providers) in zip(axes[0], found, strict=True):
        ours = our_row(providers.values())
        timed = [row for row in providers.values() if ours and len(row.samples_ms) == len(ours.samples_ms)]
        if ours is None or not timed:
            return None
        timed.sort(key=lambda row: row.median_ms or 0.0)
        ratios = [Ratio.of(ours, row) for row in timed]
        middle = [ratio.median for ratio in ratios]
        spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        colours = [OURS if row is ours else BAD if row.provider == DENSE else OTHER for row in timed]
        axis.barh([TITLES.get(row.provider, row.provider) for row in timed], middle, xerr=spread, color=colours)
        axis.invert_yaxis()
        axis.axvline(1, color=OURS, linewidth=0.8)
        axis.set_xlabel("time, ours = 1")
        axis.set_title(case_label(case))
    return figure


def memory(rows: Sequence[Row], gpu: bool) -> Any:
    """Bytes held against length; dashed where computed."""
    held = {name: points for name, points in holdings(rows, gpu).items() if len(points) > 1}
    if DENSE not in held:
        return None
    figure, axis = plt.subplots(figsize=(5.6, 3.6))
    longest = max(points[-1][0].tokens for points in held.values())
    for name, points in held.items():
        colour = BAD if name == DENSE else OTHER if name == "sdpa" else OURS
        tokens = [case.tokens for case, _ in points]
        axis.plot(tokens, [size / 2**30 for _, size in points], "o-", color=colour, label=TITLES.get(name, name))
        growth = law(points)
        beyond = [tokens[-1], *(t for t in (9216, 16384, 65536) if tokens[-1] < t <= max(longest, 16384))]
        axis.plot(beyond, [growth.bytes(t) / 2**30 for t in beyond], "--", color=colour)
    axis.axhline(MEMORY_LIMIT / 2**30, color="black", linewidth=0.8)
    axis.text(256, 1.1 * MEMORY_LIMIT / 2**30, "24 GiB")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="GiB held, inputs included (dashed: computed)")
    axis.legend(frameon=False)
    return figure


def roofline(rows: Sequence[Row], gpu: bool) -> Any:
    """Our measured cases under the machine's measured ceilings."""
    machine = [row for row in rows if row.suite == "roofline" and row.on_gpu == gpu]
    points = []
    for name, providers in grouped(rows, "kernels", gpu).items():
        ours = our_row(providers.values())
        if ours is not None and ours.median_ms and ours.flops:
            points.append((Case.parse(name), ours))
    if not machine or not points:
        return None
    ceilings = Ceilings.of_rows(machine)
    figure, axis = plt.subplots(figsize=(5.6, 3.6))
    itemsize = 4 if points[0][1].dtype == "float32" else 2
    for head_dim in sorted({case.head_dim for case, _ in points}):
        chosen = [(case, row) for case, row in points if case.head_dim == head_dim]
        intensity = [case.flops / case.bytes(itemsize) for case, _ in chosen]
        reached = [case.flops / (1e-3 * (row.median_ms or 1)) / 1e12 for case, row in chosen]
        axis.scatter(intensity, reached, s=14, label=f"head dim {head_dim}")
        # Softmax needs an exponential a score whatever the head dimension: a ceiling of its own for each.
        most = max(case.flops / case.exponentials for case, _ in chosen) * ceilings.exponentials / 1e12
        if most < ceilings.flops / 1e12:
            axis.axhline(most, linestyle=":", linewidth=0.8, color=axis.collections[-1].get_facecolor()[0])
    low, high = axis.get_xlim()
    span = [max(low, 1.0), max(high, 1.2 * ceilings.flops / ceilings.bytes)]
    steps = [span[0] * (span[1] / span[0]) ** (i / 99) for i in range(100)]
    axis.plot(steps, [min(ceilings.flops, x * ceilings.bytes) / 1e12 for x in steps], color="black", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="flops a byte", ylabel="TFLOP/s (dotted: exponentials' ceiling)")
    axis.legend(frameon=False)
    return figure


def edits(rows: Sequence[Row], gpu: bool) -> Any:
    """A UNet step against image size: time and peak memory of every editor."""
    series: dict[tuple[str, str], dict[str, list[tuple[int, Row]]]] = {}
    for name, measured in grouped(rows, "edits", gpu).items():
        case = UNetCase.parse(name)
        if case.steps == 1 and case.targets == 1:
            lines = series.setdefault((case.model, case.selection), {})
            for editor, row in measured.items():
                if row.status == "ok" and not editor.endswith((GRAPH, COMPILED)):
                    lines.setdefault(editor, []).append((case.pixels, row))
    grown = {key: lines for key, lines in series.items() if len(lines.get("fpe", [])) > 1}
    if not grown:
        return None
    figure, axes = plt.subplots(len(grown), 2, figsize=(8, 3.0 * len(grown)), squeeze=False)
    for (time, peak), ((model, selection), lines) in zip(axes, grown.items(), strict=True):
        for editor, points in lines.items():
            points.sort(key=lambda point: point[0])
            pixels = [size for size, _ in points]
            colour = {"fpe": OURS, DENSE: BAD, UNEDITED: "black"}.get(editor, OTHER)
            look = {"color": colour, "label": TITLES.get(editor, editor), "marker": "o", "markersize": 3}
            time.plot(pixels, [row.median_ms for _, row in points], **look)
            peak.plot(pixels, [(row.peak_mb or 0) / 1e3 for _, row in points], **look)
        time.set(yscale="log", xlabel="pixels a side", ylabel="ms a step", title=f"{model}, {selection} layers")
        peak.set(yscale="log", xlabel="pixels a side", ylabel="GB beyond the weights")
        time.legend(frameon=False)
    return figure


FIGURES: dict[str, Callable[[Sequence[Row], bool], Any]] = {
    "speed": speed,
    "memory": memory,
    "roofline": roofline,
    "edits": edits,
}


def draw_all(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """Draw every figure that there are rows for, as SVG and PNG; yields the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        for device in ("cpu", "gpu"):
            with plt.rc_context(STYLE):
                figure = draw(rows, device == "gpu")
                if figure is None:
                    continue
                for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
                    path = folder / f"{name}-{device}.{kind}"
                    figure.savefig(path, **options)
                    yield path
                plt.close(figure)
