"""What the process that stages and workers are forked from has imported: it takes seconds, and is done once.

Nothing here may touch a device, since what a process has opened there its children cannot use.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util

MODULES = (
    "torch",
    "fpe_kernels.ops",
    "fpe_kernels.testing",
    "benchmarks.run",
    "benchmarks.candidates",
    "benchmarks.workers.problems",
)
OPTIONAL = ("fpe_kernels.backends.triton.backend", "diffusers", "fpe_pipeline")

for name in MODULES:
    importlib.import_module(name)
for name in OPTIONAL:
    if name.startswith("fpe") or importlib.util.find_spec(name):
        try:
            importlib.import_module(name)
        except ImportError:  # the stage that needs it says so
            continue

# Peaks of memory are measured after a collection, which would go through all of this each time.
gc.collect()
gc.freeze()
