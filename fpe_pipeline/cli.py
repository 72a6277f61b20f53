"""The public name of the command line, which is :mod:`fpe_pipeline.app`'s: ``python -m fpe_pipeline.cli`` is `fpe`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments after the program's name; default: those of the process.
    """
    try:
        from .app.cli import main as run
    except KeyboardInterrupt:  # which the command itself answers once it is imported
        print("fpe: interrupted", file=sys.stderr)
        return 130
    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
