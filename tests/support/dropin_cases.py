"""The golden cases of other tools' own surfaces: what is kept of them here, or all of it in a folder of the user's."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.golden_cases import GOLDEN, GoldenCase

#: Of the suggested tolerance, which is twenty times the distance of float32 from float64.
SHARE = 0.25


@cache
def load_dropin(name: str) -> GoldenCase:
    """A case ``dropin_<name>``; its tensors are a subset unless FPE_GOLDEN names the folder with all of them."""
    path = Path(os.environ.get("FPE_GOLDEN", GOLDEN)) / "cases" / f"dropin_{name}"
    settings = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return GoldenCase(name, settings, load_file(path.with_suffix(".safetensors")))


def outputs(case: GoldenCase, prefix: str = "") -> list[str]:
    """Names of the case's outputs that begin so, without "out."."""
    names = [name.removeprefix("out.") for name in case.tensors if name.startswith("out.")]
    return [name for name in names if name.startswith(prefix)]


def compare(case: GoldenCase, name: str, given: torch.Tensor, share: float = SHARE) -> None:
    """Fail where an output is further from the case's than a share of its suggested tolerance."""
    expected = case.tensors[f"out.{name}"]
    assert given.shape == expected.shape, f"{name}: {tuple(given.shape)} where {tuple(expected.shape)} is expected"
    distance = (given.double() - expected.double()).abs().max().item() / case.settings["suggested_atol"][name]
    assert distance <= share, f"{name} is off by {distance:.3g} of its tolerance"
