"""The public name of the command line, which is :mod:`fpe_pipeline.app`'s: ``python -m fpe_pipeline.cli`` is `fpe`."""

import sys

from .app.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
