"""`python -m fpe_pipeline` is the `fpe` command."""

import sys

from .cli import main

sys.exit(main())
