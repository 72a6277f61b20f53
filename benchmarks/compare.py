"""`python -m benchmarks.compare OLD NEW`: has anything of ours become slower, larger or wrong?

Times of two runs are not comparable, ratios within a run are: a case has become slower when ours takes more
of the anchor's time (PyTorch's fused attention, in the same rounds) than it took before, beyond the spread of
both. Memory and correctness are compared as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from .report import OURS
from .rows import Ratio, Row, read, read_all

ANCHORS = ("sdpa", "unedited")


Key = tuple[str, str, str, str, int]


def by_case(rows: Iterable[Row]) -> dict[Key, dict[str, Row]]:
    cases: dict[Key, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.suite, row.case, row.device, row.dtype, row.threads), {})[row.provider] = row
    return cases


def regressions(old: Iterable[Row], new: Iterable[Row], tolerance: float = 0.15) -> list[str]:
    """A line for each thing of ours that is worse in `new`; empty where nothing is."""
    before, found = by_case(old), []
    for key, now in by_case(new).items():
        then = before.get(key, {})
        for name in OURS:
            if name in now and name in then:
                found += [f"{key[0]} {key[1]}, {name}: {what}" for what in _worse(name, then, now, tolerance)]
    return found


def _worse(name: str, then: dict[str, Row], now: dict[str, Row], tolerance: float) -> Iterable[str]:
    old, new = then[name], now[name]
    if old.status == "ok" and new.status != "ok":
        yield f"was measured, is now {new.status}: {new.reason}"
        return
    if old.peak_mb and new.peak_mb and new.peak_mb > 1.02 * old.peak_mb:
        yield f"holds {new.peak_mb:.1f} MB where it held {old.peak_mb:.1f} MB"
    anchor = next((a for a in ANCHORS if _paired(then, name, a) and _paired(now, name, a)), None)
    if anchor is None:
        return
    cost_then, cost_now = Ratio.of(then[anchor], old), Ratio.of(now[anchor], new)
    if cost_now.median > (1 + tolerance) * cost_then.median and cost_now.low > cost_then.high:
        yield f"takes {cost_now} the time of {anchor}, took {cost_then}"


def _paired(rows: dict[str, Row], name: str, anchor: str) -> bool:
    return anchor in rows and 0 < len(rows[anchor].samples_ms) == len(rows[name].samples_ms)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path, help="a file of rows, or a folder of them")
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.15, help="share by which a ratio may grow")
    options = parser.parse_args(argv)
    old, new = (read_all(path) if path.is_dir() else read(path) for path in (options.old, options.new))
    shared = by_case(old).keys() & by_case(new).keys()
    found = regressions(old, new, options.tolerance)
    print("\n".join(found) or f"nothing of ours is worse in the {len(shared)} cases that both hold")
    return 1 if found or not shared else 0


if __name__ == "__main__":
    sys.exit(main())
