"""Launches that are worked out once must serve every later call of the same layout, whatever its tensors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from fpe_kernels import AttentionMap, shared_attention
from fpe_kernels.testing import assert_within_budget


def test_a_launch_remembered_from_aliased_tensors_serves_distinct_ones() -> None:
    x, y, value = (torch.randn(1, 2, 16, 16) for _ in range(3))
    for query, key in ((x, x), (x, y), (y, x)):
        out = AttentionMap(query, key, backend="triton") @ value
        exact = AttentionMap(query.double(), key.double(), backend="reference") @ value.double()
        plain = AttentionMap(query, key, backend="reference") @ value
        assert_within_budget(out, plain, exact, torch.float32)


def test_tables_and_layouts_are_part_of_what_is_remembered() -> None:
    query, key = torch.randn(2, 2, 2, 16, 16)
    value = torch.randn(2, 2, 16, 16)
    for map_index in ([0, 1], [1, 0], [0, 0], [1, 1]):
        for laid_out in (value, value.transpose(1, 2).contiguous().transpose(1, 2)):
            out = shared_attention(query, key, laid_out, map_index, backend="triton")
            exact = shared_attention(query.double(), key.double(), value.double(), map_index, backend="reference")
            plain = shared_attention(query, key, value, map_index, backend="reference")
            assert_within_budget(out, plain, exact, torch.float32)
