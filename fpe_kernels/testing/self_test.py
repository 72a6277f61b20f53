"""A short check that a backend computes on this machine what float64 gives: products, statistics and gradients.

    python -m fpe_kernels.testing.self_test torch cpu --seconds 20

A line of JSON for each case: its name, and why it failed or nothing. A backend that needs an environment of its own, as
Triton's interpreter does, is checked in a process of its own that way.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention_map import AttentionMap, shared_attention
from .budget import assert_matches
from .cases import Case, make_case

__all__ = ["CASES", "main", "self_test"]

#: Cases by name, the most telling first.
CASES: dict[str, dict[str, Any]] = {
    "one map for three rows": {"map_index": (0, 0, 0), "queries": 48, "keys": 48, "head_dim": 40},
    "shapes that fill no tile": {"queries": 37, "keys": 53, "head_dim": 24, "value_dim": 40},
    "text as keys": {"maps": 2, "map_index": (0, 1, 1), "queries": 32, "keys": 77, "head_dim": 64},
    "a mask": {"queries": 20, "keys": 33, "bias": (True, True, True, True), "masked": 0.3},
    "weights of rows": {"map_index": (0, 0), "queries": 40, "row_weight": (True, False, True)},
}


def self_test(
    backend: str, device: str, dtypes: Sequence[torch.dtype] = (torch.float32,), seconds: float = 60.0
) -> Iterator[tuple[str, str]]:
    """Name of each case, and why it failed, or nothing, until the time is spent; at least one case is checked.

    Args:
        backend: of the products and gradients.
        device: of the tensors.
        dtypes: of the tensors, each of which every case has.
        seconds: after which no case is begun.
    """
    begun = time.monotonic()
    for number, (name, recipe) in enumerate(CASES.items()):
        for dtype in dtypes:
            if number and time.monotonic() - begun > seconds:
                return
            case = make_case(number, dtype=dtype, device=device, **recipe)
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            try:
                assert_matches(case, **_results(case, backend))
                yield label, ""
            except Exception as error:  # a kernel that does not compile, a launch that fails, a wrong number
                yield label, " ".join(str(error).split()) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Check one backend; the exit code is 1 where a case failed."""
    parser = argparse.ArgumentParser(prog="python -m fpe_kernels.testing.self_test")
    parser.add_argument("backend")
    parser.add_argument("device")
    parser.add_argument("--seconds", type=float, default=60.0)
    asked = parser.parse_args(arguments)
    dtypes = (torch.float32, torch.float16) if asked.device.startswith("cuda") else (torch.float32,)
    failed = 0
    for name, reason in self_test(asked.backend, asked.device, dtypes, asked.seconds):
        print(json.dumps([name, reason]), flush=True)
        failed += bool(reason)
    return 1 if failed else 0


def _results(case: Case, backend: str) -> dict[str, Tensor]:
    """Results of a case by public names, as :data:`~fpe_kernels.testing.RESULTS` calls them."""
    query, key, value = (one.detach().requires_grad_() for one in (case.query, case.key, case.value))
    out = shared_attention(
        query, key, value, case.map_index, scale=case.scale, bias=case.bias, weight=case.row_weight, backend=backend
    )
    grads = torch.autograd.grad((out * case.weight).sum(), (query, key, value))
    rows = list(case.map_index)
    with torch.no_grad():
        shared = AttentionMap(case.query, case.key, scale=case.scale, bias=case.bias, backend=backend)[rows]
        results = {"out": out.detach(), "adjoint": shared.T @ case.weight}
    return results | dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True))


if __name__ == "__main__":
    sys.exit(main())
