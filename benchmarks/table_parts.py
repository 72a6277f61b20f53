"""What the tables of README share: names of providers, and how rows become lines of Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from .rows import Ratio, Row

MEMORY_LIMIT = 24 * 2**30
DENSE, GATHERED, UNEDITED = "dense-original", "sdpa-gathered", "unedited"
TITLES = {
    "fpe": "ours",
    "fpe-triton": "ours (Triton)",
    "fpe-torch": "ours (PyTorch)",
    UNEDITED: "unedited",
    GATHERED: "SDPA, gathered",
    DENSE: "dense original",
}
PLACEMENTS = {
    "full-source-dropped": "source dropped early",
    "recorded-device": "source recorded, on the device",
    "recorded-cpu": "in memory",
    "recorded-folder": "in a folder",
}

Cases = dict[str, dict[str, Row]]


def grouped(rows: Iterable[Row], suite: str, gpu: bool) -> Cases:
    """Case to provider to row, for one suite on one kind of device.

    A file may hold a case of several devices, dtypes and numbers of threads, whose times are no ratio: the last stands.
    """
    cases: Cases = {}
    for row in rows:
        if row.suite == suite and row.on_gpu == gpu:
            found = cases.setdefault(row.case, {})
            if any(conditions(other) != conditions(row) for other in found.values()):
                found.clear()
            found[row.provider] = row
    return cases


def conditions(row: Row) -> tuple[str, str, int]:
    """What rows have to share for their times to be compared."""
    return row.device, row.dtype, row.threads


def beside(rows: Iterable[Row]) -> str:
    """The machines of a table's rows, in a line each."""
    return "\n".join(f"*{machine}*" for machine in sorted({row.machine for row in rows}))


def not_yet(gpu: bool, what: str) -> str:
    device, command = ("a GPU", "make gpu") if gpu else ("a CPU", "python -m benchmarks")
    return f"*{what}: not measured on {device} yet (`{command}`).*"


def slower(row: Row | None, ours: Row | None) -> str:
    """How many times longer a row takes than ours."""
    if row is None:
        return "–"
    if row.status != "ok":
        return row.status
    if ours is None or len(row.samples_ms) != len(ours.samples_ms) or not ours.samples_ms:
        return "–"
    ratio = Ratio.of(ours, row)
    return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def best_sdpa(providers: dict[str, Row]) -> Row | None:
    """The fastest of PyTorch's attention: on what rows share, or on queries and keys of every row's own."""
    names = ("sdpa", UNEDITED)
    fused = [row for name, row in providers.items() if name.startswith(names) and row.median_ms is not None]
    return min(fused, key=lambda row: row.median_ms or 0.0, default=None)
