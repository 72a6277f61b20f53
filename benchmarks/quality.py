"""Tables and plots of edit quality, from what ``fpe evaluate`` wrote into ``results/quality``.

The scores are per pair and are the embedded model's; they have a schema of their own beside the timings' rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fpe_pipeline.models import embedded_path
from fpe_pipeline.quality.report import plot, table

from .rows import ROOT, Row

RESULTS = ROOT / "benchmarks" / "results" / "quality"
STUDIES = {
    "quality": "fpe evaluate -o out/quality",
    "quality-sweep": "fpe evaluate --sweep --methods --pairs 40 -o out/quality-sweep",
}


def study_table(rows: Sequence[Row], name: str) -> str:
    """One study's table, with its settings in a line below; it has no use for ``rows``."""
    result = _read(name)
    if result is None:
        return f"*Edit quality: not measured yet (`{STUDIES[name]}`).*"
    return table(result["summary"]) + "\n" + about(result)


def about(result: dict[str, Any]) -> str:
    """What the study was made with, for a person."""
    settings, made = result["settings"], result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in made.items() if name != "machine")
    return (
        f"*{settings['pairs']} pairs of each kind on held-out prompts, {settings['steps']} steps, guidance "
        f"{settings['guidance']:g}, maps replaced in the first {100 * settings['self_replace']:.0f} % of the steps, "
        f"seed {settings['seed']}; 95 % bootstrap intervals; weights {settings['weights']}; {versions}*"
    )


def model_table(rows: Sequence[Row]) -> str:
    """What the embedded model itself measures, as its export wrote it down; no use for ``rows`` here either."""
    figures = json.loads((embedded_path() / "measurements.json").read_text())
    size = sum(path.stat().st_size for path in embedded_path().rglob("*") if path.is_file())
    drawn, judge, vae = figures["generated"], figures["judge"], figures["autoencoder"]
    lines = [
        f"| pictures that show the prompt's {name} | {100 * drawn[name]:.1f} % of {drawn['images']} |"
        for name in ("colour", "object", "background")
    ]
    lines += [
        f"| the judge itself, on held-out renders: objects | {100 * judge['object']:.1f} % of {judge['images']} |",
        f"| … and silhouettes (IoU) | {judge['silhouette_iou']:.3f} |",
        f"| autoencoder on held-out renders | {vae['psnr']:.1f} dB |",
        f"| everything that is shipped | {size / 1e6:.2f} MB |",
    ]
    return "\n".join(["| embedded model | |", "| --- | ---: |", *lines])


def draw(folder: Path) -> Iterator[Path]:
    """Draw every study that there is; yields the files."""
    for name in STUDIES:
        result = _read(name)
        if result is not None:
            plot(result["summary"], folder / f"{name}.png")
            yield folder / f"{name}.png"


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
