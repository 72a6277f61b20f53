"""The table of edited steps of transformers, from rows of the suite ``joint-steps``."""

from __future__ import annotations

from collections.abc import Sequence

from fpe_pipeline.texts import markdown_table

from .report import number
from .rows import Ratio, Row
from .table_parts import DENSE, GATHERED, TITLES, UNEDITED, beside, grouped, not_yet, slower

__all__ = ["joint_steps"]


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
