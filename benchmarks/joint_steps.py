"""Steps of transformers with joint attention, edited and not: what an edit costs on models of SD3's and FLUX.1's shape.

    python -m benchmarks.joint_steps --output benchmarks/results/cpu-joint-steps.json

True head dims and lengths, fewer heads and layers. A row's samples are milliseconds of the step, of a processor's time
in one thread on a CPU, so that what else runs there does not count; ``attention`` is the unedited step's attention
alone, over queries, keys and values that were kept from it: its share of the step is the quotient of the two.
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

from .edits import ROUNDINGS
from .joint_editors import EDITORS, Attention, attention_inputs
from .joint_models import JointCase, build, model_inputs
from .measure import QUICK, THOROUGH, Effort, interleaved
from .memory import peak_bytes
from .rows import Environment, Row, read, replaced, write

__all__ = ["CASES", "run"]

STEPS = 50


CASES = (
    JointCase("sd3", 64, 333),
    JointCase("sd3", 64, 333, targets=3),
    JointCase("flux", 32, 512),
    JointCase("flux", 32, 512, targets=3),
)
SMALL = (JointCase("sd3", 4, 13, layers=2), JointCase("flux", 4, 9, targets=3))


@contextmanager
def step_of(model: Any, case: JointCase, editor: str, dtype: torch.dtype) -> Iterator[Callable[[], Tensor]]:
    """A call without arguments: one step, edited as the editor does."""
    inputs = model_inputs(case, dtype)
    with EDITORS[editor](model, case) as begin:

        def step() -> Tensor:
            begin(0, STEPS)
            return model(**inputs, return_dict=False)[0]

        yield step


def run(case: JointCase, effort: Effort, names: Sequence[str] = tuple(EDITORS)) -> list[Row]:
    """The rows of one case, its editors timed in the same rounds.

    What an editor makes is held against the same edit in float64, by gathered queries and keys, within twice the error
    of that in float32, and some roundings.
    """
    environment = Environment.read("cpu")
    about = {"suite": "joint-steps", "case": case.name, "dtype": "float32"}
    judged = _judge(case)
    rows: list[Row] = []
    ready: dict[str, tuple[Callable[[], object], dict[str, Any]]] = {}
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            step = stack.enter_context(step_of(build(case), case, name, torch.float32))
            error, budget = judged(name, step())
            found = {"provider": name, "error": error, "budget": budget}
            if not error <= budget:
                reason = f"relative error {error:.2e} exceeds its budget of {budget:.2e}"
                rows.append(Row.new(environment, **about, **found, status="wrong", reason=reason))
                continue
            ready[name] = step, {**found, "peak_mb": peak_bytes(step) / 1e6}
        layers = _kept_attention(case)
        ready["attention"] = partial(_attend, layers), {"provider": "attention"}
        calls = {name: call for name, (call, _) in ready.items()}
        samples = interleaved(calls, "cpu", effort, processor=True)
    return rows + [
        Row.new(environment, **about, **found, status="ok", samples_ms=samples[name])
        for name, (_, found) in ready.items()
    ]


def _judge(case: JointCase) -> Callable[[str, Tensor], tuple[float, float]]:
    truth: dict[str, Tensor] = {}
    with torch.no_grad():
        for kind, editor in (("unedited", "unedited"), ("edited", "sdpa-gathered")):
            with step_of(build(case, torch.float64), case, editor, torch.float64) as step:
                truth[kind] = step()
        with step_of(build(case), case, "sdpa-gathered", torch.float32) as step:
            allowed = _error(step(), truth["edited"])
    budget = 2 * allowed + ROUNDINGS * torch.finfo(torch.float32).eps
    return lambda name, out: (_error(out, truth["unedited" if name == "unedited" else "edited"]), budget)


def _error(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected).abs().max() / expected.abs().max())


def _kept_attention(case: JointCase) -> list[Attention]:
    """Queries, keys and values of every layer of an unedited step."""
    model = build(case)
    kept: list[Attention] = []
    with attention_inputs(model, case, kept):
        model(**model_inputs(case, torch.float32), return_dict=False)
    return kept


def _attend(layers: Sequence[Attention]) -> None:
    for query, key, value in layers:
        torch.nn.functional.scaled_dot_product_attention(query, key, value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.joint_steps", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cases and fewer rounds")
    parser.add_argument("--seconds", type=float, help="most seconds of timing a case")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--output", type=Path, help="file for the rows; those of other cases stay in it")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # whose time is counted
    effort = QUICK if options.quick else THOROUGH
    if options.seconds:
        effort = Effort(effort.rounds, effort.least_rounds, options.seconds, effort.sample_ms)
    for case in SMALL if options.quick else CASES:
        if options.cases not in case.name:
            continue
        measured = run(case, effort)
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
