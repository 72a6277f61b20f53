"""Makes the gallery: ``python -m docs.gallery [NAME …]``, all of it by default.

Every picture is of the embedded model, from the first seed, unselected, and holds the settings that repeat it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from fpe_pipeline.edits.registry import METHODS
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs.settings import DEFAULTS, Settings

__all__ = ["ENTRIES", "FOLDER", "page"]

FOLDER = Path(__file__).parent
SOURCE = "a photo of a red car on the beach"


def _entry(target: str, method: str = "fpe", **values: object) -> Settings:
    return DEFAULTS.with_values(source=SOURCE, targets=(target,), method=method, steps=25, threads=1, **values)


#: By name of the file, the settings of a run.
ENTRIES: dict[str, Settings] = {
    "colour": _entry("a photo of a blue car on the beach"),
    "object": _entry("a photo of a red boat on the beach"),
    "place": _entry("a photo of a red car in the desert"),
    "soft": _entry("a photo of a red boat on the beach", "fpe-soft"),
    "regional": _entry("a photo of a blue car on the beach", "fpe-regional", options={"word": "car"}),
    "p2p-replace": _entry("a photo of a blue car on the beach", "p2p-replace"),
    "masactrl": _entry("a photo of a blue car on the beach", "masactrl"),
    "pnp": _entry("a photo of a blue car on the beach", "pnp"),
    "style-aligned": _entry("a photo of a green boat on the beach", "style-aligned"),
}


def page() -> str:
    """The page of the pictures."""
    lines = [
        "# Gallery",
        "",
        "Made by `python -m docs.gallery`: the model that comes with the package, the first seed, 25 steps, nothing",
        f"selected. Left the source, *{SOURCE}*; in the middle the target from the same noise",
        "without an edit, right the edit. Each picture holds its settings:",
        "",
        "```console",
        "$ fpe edit --from docs/gallery/colour.png --steps 2 -o gallery/",
        "```",
        "",
        "Without `--steps 2` it is the picture itself again.",
        "",
    ]
    for name, settings in ENTRIES.items():
        options = "".join(f", {key} {value}" for key, value in settings.options.items())
        title = f"{METHODS[settings.method].title}{options}"
        lines += [f"**{title}**: *{settings.targets[0]}*", "", f"![{title}: {settings.targets[0]}]({name}.png)", ""]
    return "\n".join(lines).rstrip() + "\n"


def main(names: list[str]) -> None:
    for name in names or ENTRIES:
        with tempfile.TemporaryDirectory() as folder:
            comparison, *_ = runs.write(runs.execute(ENTRIES[name]), Path(folder))
            shutil.copyfile(comparison, FOLDER / f"{name}.png")
        print(FOLDER / f"{name}.png")
    (FOLDER / "README.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
