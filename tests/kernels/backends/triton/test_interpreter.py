"""What the tests mend in Triton's interpreter: kernels round to bfloat16 there as they do on a device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl


@triton.jit
def convert(wide_ptr, narrow_ptr, LENGTH: tl.constexpr):
    place = tl.arange(0, LENGTH)
    tl.store(narrow_ptr + place, tl.load(wide_ptr + place).to(tl.bfloat16))


def test_conversion_to_bfloat16_rounds_to_nearest_even() -> None:
    edges = [
        0.0,
        -0.0,
        1.0,
        1.00390625,
        1.01171875,
        -0.7771723,
        3.4e38,
        1e-40,
        float("inf"),
        -float("inf"),
        float("nan"),
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = torch.cat([torch.tensor(edges), torch.randn(256 - len(edges))]).to(device)
    narrow = torch.full((256,), 7.0, dtype=torch.bfloat16, device=device)
    convert[(1,)](wide, narrow, LENGTH=256)
    torch.testing.assert_close(narrow, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)
