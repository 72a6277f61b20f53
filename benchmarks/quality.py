"""Tables and plots of edit quality, from what ``fpe evaluate`` wrote.

``python -m benchmarks.quality NAME FOLDER …`` keeps evaluations as the study NAME in ``results/quality``; several
folders are kinds of edit (of the study ``methods``: images) that were evaluated one by one, with the same settings. The
scores are per pair and are the embedded model's; they have a schema of their own beside the timings' rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fpe_pipeline.atomic_folder import write_text
from fpe_pipeline.embedded import EMBEDDED, embedded_path
from fpe_pipeline.quality.intervals import INTERVALS
from fpe_pipeline.quality.store import dump
from fpe_pipeline.quality.study.report import plot, table
from fpe_pipeline.texts import markdown_table

from .quality_methods import METHODS, RESULTS, combined
from .rows import Row

STUDIES = {
    "quality": "fpe evaluate",
    "quality-sweep": "fpe evaluate --sweep --methods",
    "quality-sd3": "fpe evaluate --model embedded-sd3 --methods --text-tokens 1",
}


def study_table(rows: Sequence[Row], name: str) -> str:
    """One study's table, with its settings in a line below; it has no use for ``rows``."""
    result = _read(name)
    if result is None:
        return f"*Edit quality: not measured yet (`{STUDIES[name]}`).*"
    return table(result["summary"]) + "\n" + about(result)


def short_table(rows: Sequence[Row]) -> str:
    """Success and structure alone, for the front page."""
    result = _read("quality")
    if result is None:
        return f"*Edit quality: not measured yet (`{STUDIES['quality']}`).*"
    head = ["edit", "target drawn with", "edit succeeds", "silhouettes' IoU", "over shared noise"]
    lines = []
    for kind, conditions in result["summary"].items():
        for name, entry in conditions.items():
            gain = entry.get("gain_over_shared_noise")
            cells = [f"{100 * entry['success']['mean']:.1f} %", _with_interval(entry["iou"], ".3f")]
            cells.append(_with_interval(gain, "+.3f") if gain else "")
            lines.append([kind, name, *cells])
    return markdown_table(head, lines, words=2) + "\n\n" + about(result)


def _with_interval(figure: dict[str, float], form: str) -> str:
    return f"{figure['mean']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def about(result: dict[str, Any]) -> str:
    """What the study was made with, for a person."""
    settings, made = result["settings"], result["environment"]
    pairs = {kind: next(iter(conditions.values()))["pairs"] for kind, conditions in result["summary"].items()}
    counted = ", ".join(f"{count} {kind}" for kind, count in pairs.items())
    versions = ", ".join(f"{name} {version}" for name, version in made.items() if name != "machine")
    return (
        f"*Pairs on held-out prompts: {counted}; {settings['steps']} steps, guidance "
        f"{settings['guidance']:g}, maps replaced in the first {100 * settings['self_replace']:.0f} % of the steps, "
        f"seed {settings['seed']}; {INTERVALS}; weights {settings['weights']}; {versions}*"
    )


def model_table(rows: Sequence[Row], model: str = EMBEDDED) -> str:
    """What an embedded model itself measures, as its export wrote it down; no use for ``rows`` here either."""
    try:
        folder = embedded_path(model)
    except FileNotFoundError:
        return f"*{model}: not trained yet (`python -m fpe_pipeline.embedded.training.train_flow`).*"
    figures = json.loads((folder / "measurements.json").read_text())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    drawn, judge, vae = figures["generated"], figures["judge"], figures["autoencoder"]
    lines = [
        [f"pictures that show the prompt's {name}", f"{100 * drawn[name]:.1f} % of {drawn['images']}"]
        for name in ("colour", "object", "background")
    ]
    lines += [
        ["the judge itself, on held-out renders: objects", f"{100 * judge['object']:.1f} % of {judge['images']}"],
        *([["… and silhouettes (IoU)", f"{judge['silhouette_iou']:.3f}"]] if "silhouette_iou" in judge else []),
        ["autoencoder on held-out renders", f"{vae['psnr']:.1f} dB"],
        ["everything that is shipped", f"{size / 1e6:.2f} MB"],
    ]
    return markdown_table([f"{model} model" if model == EMBEDDED else model, ""], lines)


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


def joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One study of evaluations of different kinds of edit.

    Raises:
        ValueError: two hold the same kind, or they were made with different settings or packages.
    """
    first, whole = results[0], {**results[0], "summary": {}, "scores": {**results[0]["scores"], "rows": []}}
    for result in results:
        for part, varies in (("settings", {"kinds", "pairs"}), ("environment", set())):
            differing = [k for k in first[part] if k not in varies and first[part][k] != result[part][k]]
            if differing:
                raise ValueError(f"evaluations differ in {', '.join(differing)}: evaluate them again with one setting")
        if whole["summary"].keys() & result["summary"].keys():
            raise ValueError(
                f"two evaluations hold {', '.join(whole['summary'].keys() & result['summary'].keys())} edits"
            )
        whole["summary"] |= result["summary"]
        whole["scores"]["rows"] += result["scores"]["rows"]
    whole["settings"] = {**first["settings"], "kinds": list(whole["summary"]), "pairs": None}
    return whole


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n\n")[1])
    parser.add_argument("name", choices=[*STUDIES, METHODS])
    parser.add_argument("folders", type=Path, nargs="+", help="what fpe evaluate wrote")
    options = parser.parse_args(argv)
    results = [json.loads((folder / "evaluation.json").read_text()) for folder in options.folders]
    result = combined(results) if options.name == METHODS else joined(results)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS / f"{options.name}.json", dump(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
