"""Whether editing works here: an edit of a tiny UNet against maps that are written out, one by the embedded model.

    python -m fpe_pipeline.app.self_test

A line of JSON for each check: its name, and why it failed or nothing. `fpe doctor` runs it in a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

__all__ = ["main"]


def main() -> int:
    """Print what was found; the exit code is 1 where a check failed."""
    checks: dict[str, Callable[[], None]] = {"an edit in float64": _tiny_edit, "the embedded model": _embedded}
    failed = 0
    for name, check in checks.items():
        reason = ""
        try:
            check()
        except Exception as error:  # whatever of five libraries
            reason, failed = " ".join(str(error).split()) or type(error).__name__, failed + 1
        print(json.dumps([name, reason]), flush=True)
    return 1 if failed else 0


def _tiny_edit() -> None:
    from ..edits import FreePromptEdit
    from ..testing.check import TOLERANCE, check_edit

    worst = check_edit(FreePromptEdit(0.8)).worst
    if worst.error > TOLERANCE:
        raise AssertionError(str(worst))


def _embedded() -> None:
    from ..runs import run as runs

    settings = runs.Settings("a photo of a red car", ("a photo of a blue car",), steps=1, control=False, device="cpu")
    source, edited = (run := runs.execute(settings)).source, run.edited[0]
    if source.tobytes() == edited.tobytes():
        raise AssertionError("the edit is its source")


if __name__ == "__main__":
    from .console import quiet_imports

    quiet_imports()
    sys.exit(main())
