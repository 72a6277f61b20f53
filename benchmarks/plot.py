"""`python -m benchmarks.plot`: figures and README tables, from the committed rows and nothing else.

    python -m benchmarks.plot --update README.md benchmarks/README.md
    python -m benchmarks.plot --check README.md benchmarks/README.md

A README holds a table between two markers, and what stands between them is rewritten:

    <!-- table: headline-cpu -->
    <!-- end table -->
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fpe_pipeline.atomic_folder import write_text
from fpe_pipeline.embedded import EMBEDDED_SD3

from . import quality, quality_methods, tools_table
from .rows import ROOT, Row, read_all
from .tables import TABLES as ROW_TABLES

RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "benchmarks" / "figures"
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end table -->)", re.DOTALL)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    **ROW_TABLES,
    **{name: partial(quality.study_table, name=name) for name in quality.STUDIES},
    "quality-short": quality.short_table,
    **quality_methods.TABLES,
    **tools_table.TABLES,
    "embedded-model": quality.model_table,
    "embedded-sd3": partial(quality.model_table, model=EMBEDDED_SD3),
}


def rewritten(text: str, rows: Sequence[Row]) -> str:
    """The text with every table as the rows have it."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
        return match[1] + TABLES[name](rows) + "\n" + match[3]

    return BLOCK.sub(table, text)


def stale(path: Path, rows: Sequence[Row]) -> list[str]:
    """Names of the tables in a file that differ from what the rows say."""
    text = path.read_text(encoding="utf-8")
    pairs = zip(BLOCK.finditer(text), BLOCK.finditer(rewritten(text, rows)), strict=True)
    return [old["name"] for old, new in pairs if old[0] != new[0]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rows")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder to draw into")
    parser.add_argument("--update", type=Path, nargs="+", default=[], help="files whose tables are rewritten")
    parser.add_argument("--check", type=Path, nargs="+", default=[], help="only say which tables are stale")
    options = parser.parse_args(argv)
    rows = read_all(options.results)
    if options.check:
        old = {path: names for path in options.check if path.exists() and (names := stale(path, rows))}
        for path, names in old.items():
            print(f"{path}: {', '.join(names)} not as the rows have it; run `make figures`")
        return 1 if old else 0
    for path in options.update:
        if path.exists():
            write_text(path, rewritten(path.read_text(encoding="utf-8"), rows))
    from .figures import draw_all

    for path in (*draw_all(rows, options.figures), *quality.draw(options.figures)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
