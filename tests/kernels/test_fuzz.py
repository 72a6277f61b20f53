"""Random cases against float64: a handful by default, thousands under ``make test-all``."""

from __future__ import annotations

import os

import pytest

from tests.support.fuzzing import check_seed

FAST = {"torch": 90, "triton": 4}
FULL = {"torch": 10_000, "triton": 2_000}
PIECES = 20  # so that a run over several processes shares the work, and progress shows


def device_of(backend: str) -> str:
    import torch

    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", FAST)
def test_some_random_cases(name: str) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    for seed in range(FAST[name]):
        check_seed(seed, name, device_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
@pytest.mark.parametrize("name", FULL)
def test_many_random_cases(name: str, piece: int) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    for seed in range(piece, FULL[name], PIECES):
        check_seed(seed, name, device_of(name))


@pytest.mark.parametrize("name", FULL)
def test_one_seed(name: str) -> None:
    """``FUZZ_SEED=… pytest -k one_seed`` repeats a case."""
    check_seed(int(os.environ.get("FUZZ_SEED", "0")), name, device_of(name))
