"""Other tools' originals against our drop-ins: the time and the peak memory of one step with each.

    python -m benchmarks.tools --output benchmarks/results/cpu-tools.json
    python -m benchmarks.tools --tools daam masactrl --sides 64

A step is a call of a pipeline, or of its model, with random weights: of a UNet whose layers have as many tokens as the
latent has pixels, with a source and a target, guided; of a FLUX.1 of two blocks and as many image tokens. The
original's way is written from its rule (`tools_dense.py`), maps written out where it does that; for diffusers' own
pipelines it is their processors as they are. Both outputs have to agree before either is timed. Beside them stands the
step without any tool; of Attend-and-Excite and pix2pix-zero the gradient of a loss that asks for no map.

From 128 on a call takes many seconds. There is no unconditional half then, so that more of the originals' maps fit; and
tools whose step is the same share its rounds (`tools_long.py`). A file of rows keeps those of other cases.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .measure import Effort, interleaved
from .memory import peak_bytes
from .rows import Row, read, replaced, write
from .tools_cases import LONG, TOOLS, case_name
from .tools_long import groups, run_together
from .tools_ways import Tool

__all__ = ["FEW", "run"]

FEW = Effort(rounds=5, least_rounds=3, seconds=8.0, sample_ms=5.0, calls_a_sample=3)


def run(tool: str, side: int, effort: Effort = FEW, device: str = "cpu") -> list[Row]:
    """The rows of one tool at one size.

    Args:
        tool: a key of `TOOLS`.
        side: of the latents.
        effort: how long to measure.
        device: "cpu" or "cuda".
    """
    measured = Tool(tool, side, device)
    error = measured.error({name: way() for name, way in measured.ways.items()})
    wrong = measured.wrong(error)
    if wrong:
        return [*measured.missing(), *wrong]
    samples = interleaved(measured.ways, device, effort, wall=True)
    peaks = {name: peak_bytes(way, device) for name, way in measured.ways.items()}
    return [*measured.missing(), *measured.measured(samples, peaks, error)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools", description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS), help="(default: all)")
    parser.add_argument("--sides", nargs="+", type=int, default=[64, LONG], help=f"of the latents (default: 64 {LONG})")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="file for the rows, written after every case; it keeps others")
    options = parser.parse_args(argv)
    before = read(options.output) if options.output is not None and options.output.exists() else []
    before = [row for row in before if _is_a_case(row.case)]
    rows: list[Row] = []
    for side in options.sides:
        together = groups(options.tools) if side >= LONG else [[tool] for tool in options.tools]
        for tools in together:
            long = side >= LONG
            measured = run_together(tools, side, options.device) if long else run(tools[0], side, device=options.device)
            for row in measured:
                time = "" if row.median_ms is None else f"{row.median_ms:10.1f} ms{row.peak_mb:10.1f} MB"
                print(f"{row.case:<44}{row.provider:<16}{row.status:<8}{time}{row.reason}", flush=True)
            rows += measured
            if options.output is not None:
                write(options.output, replaced(before, rows))
    return 1 if any(row.status == "wrong" for row in rows) else 0


def _is_a_case(case: str) -> bool:
    """Whether a row's case is one that is measured still, under this name."""
    tool, _, latents = case.partition("/")
    return tool in TOOLS and case == case_name(tool, int(latents.partition("x")[0]))


if __name__ == "__main__":
    sys.exit(main())
