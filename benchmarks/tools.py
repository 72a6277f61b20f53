"""Other tools' originals against our drop-ins: the time and the peak memory of one step with each.

    python -m benchmarks.tools --output benchmarks/results/cpu-tools.json
    python -m benchmarks.tools --tools daam masactrl --sides 64

A step is a call of a pipeline, or of its model, with random weights: of a UNet whose layers have as many tokens as the
latent has pixels, with a source and a target, guided; of a FLUX.1 of two blocks and as many image tokens. The
original's way is written from its rule (`tools_dense.py`), maps written out where it does that; for diffusers' own
pipelines it is their processors as they are. Both outputs have to agree before either is timed. Beside them stands the
step without any tool, where there is one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .measure import Effort, interleaved
from .memory import peak_bytes
from .rows import Environment, Row, write
from .table_parts import DENSE, UNEDITED
from .tools_cases import TOOLS, Step

__all__ = ["BUDGET", "FEW", "run"]

OURS = "fpe"
#: Largest difference of two outputs, as a share of what the tool changes, or of the largest value where it only looks.
BUDGET = 1e-2
#: Most bytes of maps that the original's way may hold here.
MOST = 5 * 2**30
FEW = Effort(rounds=5, least_rounds=3, seconds=8.0, sample_ms=5.0, calls_a_sample=3)


@dataclass(frozen=True)
class _Way:
    """One way of making a step: what is entered around it, and the step."""

    around: Callable[[], AbstractContextManager[Any]]
    step: Callable[[], torch.Tensor]

    def __call__(self) -> torch.Tensor:
        with self.around():
            return self.step()


def run(tool: str, side: int, effort: Effort = FEW, device: str = "cpu") -> list[Row]:
    """The rows of one tool at one size.

    Args:
        tool: a key of `TOOLS`.
        side: of the latents.
        effort: how long to measure.
        device: "cpu" or "cuda".
    """
    case: Step = TOOLS[tool](side, device)
    ways = {OURS: _Way(case.ours, case.step)}
    rows: list[Row] = []
    environment = Environment.read(device)
    about = {"suite": "tools", "case": f"{tool}/{side}x{side}", "dtype": "float32"}
    if case.dense_bytes <= MOST:
        ways[DENSE] = _Way(case.dense, case.step)
    else:
        reason = f"its maps are {case.dense_bytes / 2**30:.0f} GiB, more than the {MOST / 2**30:.0f} of these rows"
        rows.append(Row.new(environment, **about, provider=DENSE, status="missing", reason=reason))
    if case.has_plain:
        ways[UNEDITED] = _Way(nullcontext, case.step)
    outputs = {name: way() for name, way in ways.items()}
    error = 0.0
    if DENSE in outputs:
        exact = outputs[DENSE].double()
        largest = exact.abs().max()
        change = (exact - outputs[UNEDITED]).abs().max() if UNEDITED in outputs else largest
        error = float((outputs[OURS] - exact).abs().max() / (largest if change < 1e-6 * largest else change))
    del outputs
    if not error <= BUDGET:
        wrong = {"provider": OURS, "status": "wrong", "error": error, "budget": BUDGET}
        return [*rows, Row.new(environment, **about, **wrong)]
    samples = interleaved(ways, device, effort, wall=True)
    for name, way in ways.items():
        gate = {"error": error, "budget": BUDGET} if name == OURS and DENSE in ways else {}
        peak = peak_bytes(way, device) / 1e6
        values = {"provider": name, "status": "ok", "samples_ms": samples[name], "peak_mb": peak, **gate}
        rows.append(Row.new(environment, **about, **values))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools", description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS), help="(default: all)")
    parser.add_argument("--sides", nargs="+", type=int, default=[64, 128], help="of the latents (default: 64 128)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="file for the rows, written after every case")
    options = parser.parse_args(argv)
    rows: list[Row] = []
    for side in options.sides:
        for tool in options.tools:
            measured = run(tool, side, device=options.device)
            for row in measured:
                time = "" if row.median_ms is None else f"{row.median_ms:10.1f} ms{row.peak_mb:10.1f} MB"
                print(f"{row.case:<34}{row.provider:<16}{row.status:<8}{time}{row.reason}", flush=True)
            rows += measured
            if options.output is not None:
                write(options.output, rows)
    return 1 if any(row.status == "wrong" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
