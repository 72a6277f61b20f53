"""`pytest benchmarks`: small cases under pytest-benchmark, to be compared between commits.

pytest benchmarks --benchmark-save=before
pytest benchmarks --benchmark-compare='*before' --benchmark-compare-fail=median:20%

Timed tests run here and nowhere else: `make test` never fails because a machine is busy.
"""

import pytest
import torch

from .cases import Case
from .inputs import Inputs, judge
from .providers import Missing, first_answer
from .rivals import all_providers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
SHAPES = [(1024, 8, 40), (1024, 8, 80), (256, 8, 160), (1024, 10, 64)]
CASES = [Case("regression", 256, *shape, layout=layout) for shape in SHAPES for layout in ("pair", "guided")]
CASES += [Case("regression", 256, 1024, 8, 40, op=op) for op in ("replay", "capture", "adjoint", "backward")]
PROVIDERS = all_providers()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["fpe-triton", "fpe-torch", "sdpa"])
def test_case(benchmark, name, case):
    inputs = Inputs.make(case, DEVICE, DTYPE)
    try:
        call, answer = first_answer(PROVIDERS[name], inputs)
    except Missing as reason:
        pytest.skip(str(reason))
    verdict = judge(inputs, answer)
    assert verdict.passed, verdict.reason
    benchmark.group = case.name

    def timed():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)
