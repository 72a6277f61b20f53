"""Tables of transformers: edited steps (suite ``joint-steps``), and inversions (suite ``flow-inversion``)."""

from __future__ import annotations

from collections.abc import Sequence

from fpe_pipeline.texts import markdown_table

from .report import number
from .rows import Ratio, Row
from .table_parts import DENSE, GATHERED, TITLES, UNEDITED, beside, grouped, not_yet, slower

__all__ = ["flow_inversion", "joint_steps"]

SOLVERS = {"euler": "Euler", "rf-solver": "RF-Solver", "fireflow": "FireFlow"}


def joint_steps(rows: Sequence[Row], gpu: bool) -> str:
    """Steps of transformers with joint attention, edited and not, as multiples of the unedited step."""
    lines, used = [], []
    for name, editors in grouped(rows, "joint-steps", gpu).items():
        base, attention = editors.get(UNEDITED), editors.get("attention")
        if base is None or base.status != "ok" or attention is None:
            continue
        used.append(base)
        shape, tokens, model, targets = name.split("/")
        cells = [number(base.median_ms, " ms"), _share(attention, base), number(base.peak_mb, " MB")]
        kept = editors.get("kept")
        for editor in ("fpe", GATHERED, DENSE):
            row = editors.get(editor)
            if row is None or row.status != "ok" or not row.peak_mb or not base.peak_mb:
                cells.append(row.status if row else "–")
            else:
                cells.append(f"{slower(row, base)} × time, {row.peak_mb / base.peak_mb:.2f} × memory")
        stored = slower(editors.get("stored"), base)
        cells.append("–" if kept is None else f"{stored} × time, {number(kept.peak_mb, ' MB')} kept a step")
        lines.append([f"{shape}, {tokens} tokens, {model}", targets, *cells])
    if not lines:
        return not_yet(gpu, "Steps of transformers")
    heading = ["random weights", "targets", "unedited", "of it attention", "peak"]
    columns = [*heading, *(TITLES[e] for e in ("fpe", GATHERED, DENSE)), "source first, queries and keys kept"]
    return markdown_table(columns, lines) + "\n\n" + beside(used)


def _share(part: Row, whole: Row) -> str:
    ratio = Ratio.of(whole, part)
    return f"{100 * ratio.median:.0f} % ({100 * ratio.low:.0f}–{100 * ratio.high:.0f})"


def flow_inversion(rows: Sequence[Row], gpu: bool) -> str:
    """How far a picture's latents come back from an inversion, by solver at as many calls of the model."""
    lines, used = [], []
    for case, solvers in grouped(rows, "flow-inversion", gpu).items():
        errors = {name: row.error for name, row in solvers.items() if row.status == "ok" and row.error is not None}
        if not set(SOLVERS) <= set(errors):
            continue
        used.append(solvers["euler"])
        model, size, calls = case.split("/")
        lines.append(
            [f"{model}, {size}", calls.removesuffix(" calls"), *(number(100 * errors[s], " %") for s in SOLVERS)]
        )
    if not lines:
        return not_yet(gpu, "Inversions along a flow")
    return markdown_table(["model", "calls each way", *SOLVERS.values()], lines) + "\n\n" + beside(used)
