"""Every backend keeps the contract of products and of gradients."""

from __future__ import annotations

import pytest
import torch

from tests.support.contract import FLOATS, cut_small_blocks
from tests.support.contract_gradients import GradientContract


class TestReference(GradientContract):
    backend = "reference"
    dtypes = (torch.float64, torch.float32)


class TestTorch(GradientContract):
    backend = "torch"
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class TestTorchInSmallBlocks(TestTorch):
    """The shapes of these tests fit one block; here they take many, of heads, queries and keys, and no fused call."""

    @pytest.fixture(autouse=True)
    def _small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cut_small_blocks(monkeypatch)


class TestTriton(GradientContract):
    """Through the interpreter on a machine without a CUDA device, compiled on one with."""

    backend = "triton"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = tuple(dtype for dtype in (torch.float16, *FLOATS[1:3]))

    @pytest.fixture(autouse=True)
    def _needs_triton(self) -> None:
        pytest.importorskip("triton")
