"""Launches that are kept: compiled kernels whose arguments are replaced, instead of bound by Triton in each call."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from fpe_kernels import shared_attention
from fpe_kernels.backends.triton import plans
from fpe_kernels.backends.triton.launch import product_precision


@pytest.mark.slow
def test_a_planned_call_makes_the_launches_that_it_would_make_anew() -> None:
    # A process of its own: kernels that were imported for the interpreter cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[4])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    program = [sys.executable, "-m", "tests.support.planned_calls"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("check_") == 6


def test_what_an_older_triton_does_not_know_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """3.4, the oldest that is served, has neither setting; every launch asks for them."""
    old = SimpleNamespace(runtime=SimpleNamespace(debug=True), compilation=SimpleNamespace())
    monkeypatch.setattr(plans, "triton", SimpleNamespace(knobs=old))
    assert plans.compiler_settings() == (True, None, None)
    old.compilation.instrumentation_mode = "consan"
    assert plans.compiler_settings() == (True, "consan", None)


@pytest.fixture
def _restored_precision() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this PyTorch has the older setting only")
    # A test before may have set it for products, by the older setting too, and those no longer follow the general one.
    torch.backends.fp32_precision = matmul.fp32_precision = "none"
    yield
    torch.backends.fp32_precision = matmul.fp32_precision = "none"


@pytest.mark.usefixtures("_restored_precision")
@pytest.mark.parametrize("place", [torch.backends, torch.backends.cuda.matmul], ids=["everywhere", "for products"])
def test_tf32_by_the_newer_setting(place) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [torch.randn(1, 1, 16, 16, device=device) for _ in range(3)]
    exact = shared_attention(*tensors, [0], backend="triton")
    assert product_precision(torch.float32) == "ieee"
    place.fp32_precision = "tf32"
    assert product_precision(torch.float32) == "tf32"
    assert product_precision(torch.float16) == "ieee"
    torch.testing.assert_close(shared_attention(*tensors, [0], backend="triton"), exact, rtol=1e-2, atol=1e-2)
    half = [tensor.half() for tensor in tensors]
    assert shared_attention(*half, [0], backend="triton").isfinite().all()
