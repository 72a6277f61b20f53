"""The table of first pictures: how long somebody waits for one, of the rows of `benchmarks.first_picture`."""

from __future__ import annotations

from collections.abc import Sequence

from fpe_pipeline.texts import markdown_table

from .rows import Row, quantile
from .table_parts import beside, grouped

__all__ = ["first_pictures"]

_PAGE = {
    "page": "`fpe app` in a fresh process, until its first edit is seen in the browser",
    "imports": "of it the imports of torch, diffusers and gradio, measured alone",
    "api": "of it the same edit by the API, its model loaded, measured alone",
}
_CLONE = {
    "clone": "a clone of the repository",
    "download": "the download of what the pipeline needs, as fast as this machine's index",
    "beyond": "`make demo` from there: the environment, and four pictures",
    "demo": "of it the demo itself, once the environment is there",
    "ours": "of that until its first edited picture",
}


def first_pictures(rows: Sequence[Row]) -> str:
    """Seconds of each part, and of the page what is left beside imports and edit, by rounds."""
    cases, lines, used = grouped(rows, "first-picture", False), [], []
    for case, parts in (("embedded/page", _PAGE), ("embedded/clone", _CLONE)):
        found = {name: row for name, row in cases.get(case, {}).items() if row.samples_ms}
        used += list(found.values())
        lines += [[what, _seconds(found[name].samples_ms)] for name, what in parts.items() if name in found]
        if found.keys() >= _PAGE.keys():
            rounds = zip(*(found[name].samples_ms for name in _PAGE), strict=True)
            rest = [page - imports - edit for page, imports, edit in rounds]
            lines.append(["what is left of it for the page itself", _seconds(rest)])
    if not lines:
        return "*First pictures: not measured on a CPU yet (`python -m benchmarks.first_picture`).*"
    return markdown_table(["from nothing to a first picture", "seconds"], lines) + "\n\n" + beside(used)


def _seconds(samples: Sequence[float]) -> str:
    middle, low, high = (quantile(samples, share) / 1e3 for share in (0.5, 0.2, 0.8))
    return f"{middle:.1f}" if len(samples) == 1 else f"{middle:.1f} ({low:.1f} to {high:.1f})"
