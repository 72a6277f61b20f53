"""The blocks of the ``torch`` backend on maps so small that it would leave them to PyTorch's fused attention."""

from __future__ import annotations

import pytest
import torch

from fpe_kernels import shared_attention
from fpe_kernels.backends import chunked
from fpe_kernels.testing import assert_within_budget

SHAPES = [(1, 1, 8, 8), (7, 513, 40, 40), (65, 63, 16, 24), (300, 1025, 64, 64), (1023, 77, 72, 72)]


@pytest.mark.parametrize("own_blocks", [True, False], ids=["blocks", "fused"])
@pytest.mark.parametrize(("queries", "keys", "head_dim", "value_dim"), SHAPES)
@pytest.mark.parametrize("map_index", [[0], [0, 0], [1, 0, 1]], ids=str)
def test_blocks_and_fused_calls_agree_with_float64(
    monkeypatch: pytest.MonkeyPatch,
    own_blocks: bool,
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int,
    map_index: list[int],
) -> None:
    if own_blocks:
        monkeypatch.setattr(chunked, "_fused_serves", lambda *tensors: False)
    else:
        monkeypatch.setattr(chunked, "_SMALL_MAP", 1 << 40)
    query, key = torch.randn(2, 2, queries, head_dim), torch.randn(2, 2, keys, head_dim)
    value = torch.randn(len(map_index), 2, keys, value_dim)
    out = shared_attention(query, key, value, map_index, backend="torch")
    plain = shared_attention(query, key, value, map_index, backend="reference")
    exact = shared_attention(query.double(), key.double(), value.double(), map_index, backend="reference")
    assert_within_budget(out, plain, exact, torch.float32)
