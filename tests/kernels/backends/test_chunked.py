"""The blocks of the ``torch`` backend on maps so small that it would leave them to PyTorch's fused attention."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fpe_kernels import shared_attention
from fpe_kernels.backends import chunked, fused_cpu
from fpe_kernels.backends.protocol import Maps
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
        monkeypatch.setattr(fused_cpu, "_serves", lambda *tensors: False)
    else:
        monkeypatch.setattr(fused_cpu, "_SMALL_MAP", 1 << 40)
    query, key = torch.randn(2, 2, queries, head_dim), torch.randn(2, 2, keys, head_dim)
    value = torch.randn(len(map_index), 2, keys, value_dim)
    out = shared_attention(query, key, value, map_index, backend="torch")
    plain = shared_attention(query, key, value, map_index, backend="reference")
    exact = shared_attention(query.double(), key.double(), value.double(), map_index, backend="reference")
    assert_within_budget(out, plain, exact, torch.float32)


@pytest.mark.parametrize("map_index", [(0, 0), (0, 1)], ids=str)
def test_query_rows_without_a_weight_are_not_computed(
    monkeypatch: pytest.MonkeyPatch, map_index: tuple[int, ...]
) -> None:
    """A weight on a quarter of the rows, scattered as a region of an image is, costs a quarter of the products."""
    monkeypatch.setattr(fused_cpu, "_serves", lambda *tensors: False)  # whose operator is not counted
    query, key, value = (torch.randn(2, 2, 1024, 16) for _ in range(3))
    out, logsumexp = torch.empty_like(value), torch.empty(2, 2, 1024)

    def flops(weight: torch.Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            chunked.apply(Maps(query, key, None, map_index, 0.25), value, out, logsumexp, False, weight)
        return counter.get_total_flops()

    region = torch.zeros(32, 32)
    region[8:24, 16:] = 1.0
    assert 0 < flops(region.flatten()) == flops(torch.ones(1024)) // 4
    assert flops(torch.zeros(1024)) == 0


@pytest.mark.parametrize("keys", [1, 3, 7, 15, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("map_index", [[0], [0, 0]], ids=str)
def test_a_query_that_is_not_a_number_gives_none(keys: int, dtype: torch.dtype, map_index: list[int]) -> None:
    query, key = torch.randn(1, 2, 5, 8, dtype=dtype), torch.randn(1, 2, keys, 8, dtype=dtype)
    value = torch.randn(len(map_index), 2, keys, 8, dtype=dtype)
    query[0, 1, 3, 0] = float("nan")
    out, logsumexp = torch.ops.fpe_kernels.apply(query, key, value, None, map_index, 1.0, "torch")
    for found in (out.isnan().all(-1), logsumexp.isnan()):
        assert found[:, 1, 3].all() and found.sum() == len(found)
    assert out.isnan().sum() == 8 * len(map_index)
