"""Run the notebooks from top to bottom and save what they show: ``python -m notebooks [NAME ...]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

__all__ = ["FOLDER", "executed"]

FOLDER = Path(__file__).parent
#: Seconds that a cell may take.
LONGEST = 900


def executed(path: Path) -> Any:
    """A notebook with the outputs of a kernel of its own; nothing is written.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=LONGEST, kernel_name="python3", record_timing=False, resources={"metadata": {"path": FOLDER}}
    ).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell["outputs"] = _shown(cell["outputs"])
    return notebook


def _shown(outputs: list[Any]) -> list[Any]:
    """What of a cell's outputs is kept: not the bars and warnings of libraries; lines that follow one another as one
    output, however they arrived."""
    kept: list[Any] = []
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
        elif output.name != "stderr" and kept and kept[-1].output_type == "stream":
            kept[-1]["text"] += output.text
        elif output.name != "stderr":
            kept.append(output)
    return kept


def main() -> int:
    names, known = sys.argv[1:], [path.stem for path in FOLDER.glob("*.ipynb")]
    if not set(names) <= set(known):
        print(f"usage: python -m notebooks [NAME ...] of {sorted(known)}, got {names}", file=sys.stderr)
        return 2
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            nbformat.write(executed(path), path)
            print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
