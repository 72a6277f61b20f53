"""Rows as text, for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .columns import columns
from .cost import percent_of_chip
from .rows import Ratio, Row
from .table_parts import GATHERED, best_sdpa

OURS = ("fpe-triton", "fpe-torch", "fpe", "full")


def our_row(rows: Iterable[Row]) -> Row | None:
    """The row that others are compared with: our fastest measured one."""
    ours = [row for row in rows if row.provider in OURS and row.status == "ok"]
    return min(ours, key=lambda row: row.median_ms or float("inf"), default=None)


def number(value: float | None, unit: str = "") -> str:
    """Three figures, or a dash."""
    if value is None:
        return "–"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}{unit}"


def ratio_to(row: Row, ours: Row | None) -> str:
    """How many times longer than ours, with its spread."""
    if ours is None or not row.samples_ms or len(row.samples_ms) != len(ours.samples_ms):
        return "–"
    return "1" if row is ours else str(Ratio.of(ours, row))


def case_table(rows: Sequence[Row]) -> str:
    """One case: a line a provider; times, the ratio to ours in the same rounds, peak memory, error."""
    if not rows:
        return ""
    ours = our_row(rows)
    lines = []
    for row in rows:
        if row.status != "ok":
            lines.append([row.provider, f"{row.status}: {row.reason}"])
            continue
        spread = f"{number(row.median_ms)} ({number(row.p20_ms)}–{number(row.p80_ms)})" if row.samples_ms else "–"
        lines.append(
            [
                row.provider,
                spread,
                ratio_to(row, ours),
                number(row.peak_mb),
                number(row.percent_of_limit, " %"),
                number(percent_of_chip(row), " %"),
                "–" if row.error is None else f"{row.error:.1e}",
            ]
        )
    heading = ["provider", "ms (p20–p80)", "times ours", "peak MB", "of limit", "of data sheet", "error"]
    case = next((row.case for row in rows if row.case != "any"), "any")
    return f"{rows[0].suite}: {case} [{rows[0].dtype}]\n" + columns([heading, *lines])


def summary(rows: Sequence[Row]) -> str:
    """One line a case: who is how many times slower than ours. What a run prints last."""
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.suite in ("kernels", "edits") and row.case != "any":
            cases.setdefault((row.suite, row.case, row.dtype), []).append(row)
    lines = [["case", "ours ms", "of limit", "unedited", "best SDPA", "dense original"]]
    for (suite, case, _), group in cases.items():
        ours = our_row(group)
        if ours is None:
            lines.append([f"{suite} {case}", "ours is " + ", ".join(f"{r.provider}: {r.status}" for r in group)])
            continue
        named = {row.provider: row for row in group if row.status == "ok"}
        # Of a step's editors that is one; another, as a graph, leaves out time that ours has.
        best = best_sdpa(named) if suite == "kernels" else named.get(GATHERED)
        lines.append(
            [
                f"{suite} {case}",
                number(ours.median_ms),
                number(ours.percent_of_limit, " %"),
                *(
                    ratio_to(row, ours) if row is not None else "–"
                    for row in (named.get("unedited"), best, named.get("dense-original"))
                ),
            ]
        )
    wrong = [f"  {row.provider} {row.status} in {row.case}: {row.reason}" for row in rows if row.status in BAD]
    return "\n".join([columns(lines), *wrong])


BAD = ("wrong", "failed")
