"""The tables of drop-ins against the tools' originals, and of operations on lazy maps against those on matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from fpe_pipeline.texts import markdown_table

from .report import number
from .rows import Row
from .table_parts import DENSE, UNEDITED, beside, grouped, not_yet, slower

__all__ = ["PAGES", "TABLES"]


#: By page of the docs, the tools whose rows stand there.
PAGES = {
    **{
        name: (name,)
        for name in (
            "prompt-to-prompt",
            "free-prompt-editing",
            "pnp-inversion",
            "masactrl",
            "pnp-diffusers",
            "style-aligned",
            "daam",
            "attention-map-diffusers",
            "stable-flow",
            "free-flux",
            "consist-edit",
        )
    },
    "diffusers": ("ledits++", "sag", "attend-and-excite", "pix2pix-zero"),
}


def tools(rows: Sequence[Row], gpu: bool, only: Sequence[str] | None = None) -> str:
    """A step with each tool: ours, the original's way, and the step without any tool.

    Args:
        rows: of the suite, and any others.
        gpu: whether of GPUs.
        only: the tools; default: all.
    """
    lines, used, reasons = [], [], set()
    for case, ways in sorted(grouped(rows, "tools", gpu).items(), key=lambda one: _place(one[0])):
        ours, (tool, _, latents) = ways.get("fpe"), case.partition("/")
        if ours is None or ours.status != "ok" or (only is not None and tool not in only):
            continue
        used.append(ours)
        reasons |= {row.reason for row in ways.values() if row.reason}
        others = [_beside(ways.get(name), ours) for name in (DENSE, UNEDITED)]
        lines.append([tool, latents, number(ours.median_ms, " ms"), number(ours.peak_mb, " MB"), *others])
    if not lines:
        return not_yet(gpu, "Drop-ins (`python -m benchmarks.tools`)")
    heading = ["random weights", "tokens", "ours", "peak", "the original ÷ ours", "no tool ÷ ours"]
    said = "\n".join(f"*Not measured: {reason}.*" for reason in sorted(reasons))
    return markdown_table(heading, lines) + "\n\n" + (said + "\n" if said else "") + beside(used)


def _place(case: str) -> tuple[int, int]:
    """Sizes one after the other, and within each the tools as they are listed."""
    tool, _, latents = case.partition("/")
    order = [name for names in PAGES.values() for name in names]
    return int(latents.partition("x")[0]), order.index(tool) if tool in order else len(order)


def _beside(row: Row | None, ours: Row) -> str:
    """Another way's time and memory as multiples of ours, of the rounds that it took part in."""
    if row is None or row.status != "ok" or not row.peak_mb or not ours.peak_mb:
        return "–" if row is None else row.status
    rounds = len(row.samples_ms)
    time = slower(row, replace(ours, samples_ms=ours.samples_ms[:rounds]))
    if rounds == 1:
        time = f"{time.partition(' ')[0]} (one call)"
    return f"{time} × time, {row.peak_mb / ours.peak_mb:.2f} × memory"


def operations(rows: Sequence[Row], gpu: bool) -> str:
    """The peak memory of each operation: ours, and the same line on the matrix."""
    lines, used = [], []
    for case, ways in grouped(rows, "map-operations", gpu).items():
        ours, dense = ways.get("fpe"), ways.get(DENSE)
        if ours is None or dense is None or not ours.peak_mb or not dense.peak_mb:
            continue
        used.append(ours)
        name, _, tokens = case.partition("/")
        peaks = number(ours.peak_mb, " MB"), number(dense.peak_mb, " MB")
        lines.append([name, tokens, *peaks, f"{dense.peak_mb / ours.peak_mb:.1f} ×"])
    if not lines:
        return not_yet(gpu, "Operations on lazy maps (`python -m benchmarks.map_operations`)")
    heading = ["operation", "query tokens", "ours", "the matrix", "the matrix ÷ ours"]
    return markdown_table(heading, lines) + "\n\n" + beside(used)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "tools-cpu": partial(tools, gpu=False),
    **{f"tools-cpu-{page}": partial(tools, gpu=False, only=names) for page, names in PAGES.items()},
    "map-operations-cpu": partial(operations, gpu=False),
}
