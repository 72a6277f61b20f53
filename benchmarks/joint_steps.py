"""Steps of transformers with joint attention, edited and not: what an edit costs on models of SD3's and FLUX.1's shape.

    python -m benchmarks.joint_steps --output benchmarks/results/cpu-joint-steps.json
    python -m benchmarks.joint_steps --device cuda --output benchmarks/results/cuda-joint-steps.json

True head dims and lengths; fewer layers, and on a CPU fewer heads. A row's samples are milliseconds of the step: on a
CPU of a processor's time in one thread, so that what else runs there does not count, on a GPU by the wall clock, of
steps that follow each other without a wait.
``attention`` is the unedited step's attention alone, over queries, keys and values that were kept from it: its share of
the step is the quotient of the two. ``kept`` has in place of a peak what ``stored`` keeps of one step's layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .edits import IN_A_ROW, ROUNDINGS
from .joint_editors import EDITORS, Attention, attention_inputs, stored_bytes
from .joint_models import JointCase, build, model_inputs
from .measure import QUICK, THOROUGH, Effort, interleaved
from .memory import peak_bytes
from .rows import Row, read, replaced, write
from .run import Bench

__all__ = ["CASES", "GPU_CASES", "run"]

CASES = (
    JointCase("sd3", 64, 333),
    JointCase("sd3", 64, 333, targets=3),
    JointCase("flux", 32, 512),
    JointCase("flux", 32, 512, targets=3),
    JointCase("flux", 64, 512, heads=1),
    JointCase("flux", 64, 512, heads=1, images=2),
)
#: Stable Diffusion 3.5 medium and large, FLUX.1 and FLUX.1 Kontext at 1024 px.
GPU_CASES = (
    JointCase("sd3", 64, 333, heads=24, layers=2),
    JointCase("sd3", 64, 333, heads=38, layers=2),
    JointCase("flux", 64, 512, heads=24, layers=2),
    JointCase("flux", 64, 512, heads=24, layers=2, images=2),
    JointCase("sd3", 64, 333, targets=3, heads=24, layers=2),
    JointCase("flux", 64, 512, targets=3, heads=24, layers=2),
)
SMALL = (JointCase("sd3", 4, 13, layers=2), JointCase("flux", 4, 9, targets=3))


@contextmanager
def step_of(bench: Bench, case: JointCase, editor: str) -> Iterator[Callable[[], Tensor]]:
    """A call without arguments: one step, edited as the editor does."""
    inputs = model_inputs(case, bench.dtype, bench.device)
    with EDITORS[editor](build(case, bench.dtype, bench.device), case) as step:
        yield partial(step, inputs)


def run(bench: Bench, case: JointCase, names: Sequence[str] = tuple(EDITORS)) -> list[Row]:
    """The rows of one case, its editors timed in the same rounds.

    What an editor makes is held against the same edit at higher precision, by gathered queries and keys, within twice
    the error of that at the working precision, and some roundings.
    """
    about = {"suite": "joint-steps", "case": case.name}
    judged = _judge(bench, case)
    rows: list[Row] = []
    ready: dict[str, tuple[Callable[[], object], dict[str, Any]]] = {}
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            step = stack.enter_context(step_of(bench, case, name))
            error, budget = judged(name, step())
            found = {"provider": name, "error": error, "budget": budget}
            if not error <= budget:
                reason = f"relative error {error:.2e} exceeds its budget of {budget:.2e}"
                rows.append(bench.row(**about, **found, status="wrong", reason=reason))
                continue
            ready[name] = step, {**found, "peak_mb": peak_bytes(step, bench.device) / 1e6}
        layers = _kept_attention(bench, case)
        rows.append(bench.row(**about, provider="kept", status="ok", peak_mb=stored_bytes(layers, case) / 1e6))
        ready["attention"] = partial(_attend, layers), {"provider": "attention"}
        calls = {name: call for name, (call, _) in ready.items()}
        cpu = bench.device == "cpu"
        row = 1 if cpu else IN_A_ROW
        samples = interleaved(calls, bench.device, bench.effort, processor=cpu, wall=not cpu, in_a_row=row)
    return rows + [
        bench.row(**about, **found, status="ok", samples_ms=samples[name]) for name, (_, found) in ready.items()
    ]


def _judge(bench: Bench, case: JointCase) -> Callable[[str, Tensor], tuple[float, float]]:
    precise = torch.float64 if bench.dtype == torch.float32 else torch.float32

    def made(editor: str, dtype: torch.dtype) -> Tensor:
        # Rounded weights are those of the working precision, whatever they are computed with.
        model = torch.nn.Module.to(build(case, bench.dtype, bench.device), dtype)
        inputs = {name: value.to(dtype) for name, value in model_inputs(case, bench.dtype, bench.device).items()}
        with EDITORS[editor](model, case) as step:
            return step(inputs)

    with torch.no_grad():
        truth = {"unedited": made("unedited", precise), "edited": made("sdpa-gathered", precise)}
        allowed = _error(made("sdpa-gathered", bench.dtype), truth["edited"])
    budget = 2 * allowed + ROUNDINGS * torch.finfo(bench.dtype).eps
    return lambda name, out: (_error(out, truth["unedited" if name == "unedited" else "edited"]), budget)


def _error(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected.double()).abs().max() / expected.abs().max())


def _kept_attention(bench: Bench, case: JointCase) -> list[Attention]:
    """Queries, keys and values of every layer of an unedited step."""
    model = build(case, bench.dtype, bench.device)
    kept: list[Attention] = []
    with attention_inputs(model, case, kept):
        model(**model_inputs(case, bench.dtype, bench.device), return_dict=False)
    return kept


def _attend(layers: Sequence[Attention]) -> None:
    for query, key, value in layers:
        torch.nn.functional.scaled_dot_product_attention(query, key, value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.joint_steps", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cases and fewer rounds")
    parser.add_argument("--seconds", type=float, help="most seconds of timing a case")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--output", type=Path, help="file for the rows; those of other cases stay in it")
    options = parser.parse_args(argv)
    if options.device == "cpu":
        torch.set_num_threads(1)  # whose time is counted
    effort = QUICK if options.quick else THOROUGH
    if options.seconds:
        effort = Effort(effort.rounds, effort.least_rounds, options.seconds, effort.sample_ms)
    bench = Bench(options.device, torch.float32 if options.device == "cpu" else torch.bfloat16, effort)
    for case in SMALL if options.quick else CASES if options.device == "cpu" else GPU_CASES:
        if options.cases not in case.name:
            continue
        measured = run(bench, case)
        print(f"{case.name}, {measured[0].machine}")
        for row in measured:
            told = f"{row.median_ms:10.1f} ms" if row.median_ms is not None else row.reason
            print(f"  {row.provider:<16}{told}{row.peak_mb or float('nan'):10.1f} MB", flush=True)
        if options.output is not None:
            before = read(options.output) if options.output.exists() else []
            write(options.output, replaced(before, measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
