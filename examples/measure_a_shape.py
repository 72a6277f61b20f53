"""How long a source and a target take that share a map, beside PyTorch's attention.

The arguments after the folder are tokens, heads and head dim; `python -m benchmarks` does it for every model and rival.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

import torch

from benchmarks.cases import Case
from benchmarks.inputs import Inputs, judge
from benchmarks.measure import QUICK, interleaved
from benchmarks.providers import first_answer
from benchmarks.rivals import all_providers

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", help="as of the other examples; nothing is written")
parser.add_argument("shape", nargs="*", type=int, help="tokens, heads and head dim (default 1024 8 40)")
given = parser.parse_args()
if len(given.shape) not in (0, 3):
    parser.error(f"expected tokens, heads and head dim after the folder, got {len(given.shape)} numbers")
tokens, heads, head_dim = given.shape or (1024, 8, 40)
device = "cuda" if torch.cuda.is_available() else "cpu"
ours = "fpe-triton" if device == "cuda" else "fpe-torch"
inputs = Inputs.make(
    Case("example", 256, tokens, heads, head_dim), device, torch.float16 if device == "cuda" else torch.float32
)
calls = {}
for name in (ours, "sdpa"):
    calls[name], answer = first_answer(all_providers()[name], inputs)
    verdict = judge(inputs, answer)
    assert verdict.passed, f"{name}: {verdict.reason}"  # a wrong result gets no time

samples = interleaved(calls, device, QUICK)
ratios = [plain / mine for mine, plain in zip(samples[ours], samples["sdpa"], strict=True)]
for name, times in samples.items():
    print(f"{name}: {statistics.median(times):.3g} ms, the median of {len(times)} samples")
print(f"sdpa ÷ {ours}: {statistics.median(ratios):.3g}, the median of quotients of the same round")
