"""Launches that are worked out once must serve every later call of the same layout, whatever its tensors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from fpe_kernels import AttentionMap, shared_attention
from fpe_kernels.backends.triton import configs
from fpe_kernels.backends.triton.configs import Config
from fpe_kernels.testing import assert_within_budget


def test_a_launch_remembered_from_aliased_tensors_serves_distinct_ones() -> None:
    x, y, value = (torch.randn(1, 2, 16, 16) for _ in range(3))
    for query, key in ((x, x), (x, y), (y, x)):
        out = AttentionMap(query, key, backend="triton") @ value
        exact = AttentionMap(query.double(), key.double(), backend="reference") @ value.double()
        plain = AttentionMap(query, key, backend="reference") @ value
        assert_within_budget(out, plain, exact, torch.float32)


def test_bounds_of_registers_reach_the_compiler_where_there_are_any() -> None:
    assert Config(64, 64, 4, 2).options == {"num_warps": 4, "num_stages": 2}
    assert Config(64, 64, 4, 2, maxnreg=168).options == {"num_warps": 4, "num_stages": 2, "maxnreg": 168}


def test_tables_and_layouts_are_part_of_what_is_remembered() -> None:
    query, key = torch.randn(2, 2, 2, 16, 16)
    value = torch.randn(2, 2, 16, 16)
    for map_index in ([0, 1], [1, 0], [0, 0], [1, 1]):
        for laid_out in (value, value.transpose(1, 2).contiguous().transpose(1, 2)):
            out = shared_attention(query, key, laid_out, map_index, backend="triton")
            exact = shared_attention(query.double(), key.double(), value.double(), map_index, backend="reference")
            plain = shared_attention(query, key, value, map_index, backend="reference")
            assert_within_budget(out, plain, exact, torch.float32)


@pytest.mark.parametrize("hoists", [True, False])
def test_gradients_are_the_same_whatever_waits_in_registers(monkeypatch, hoists: bool) -> None:
    assert not configs.score_config("sm_120", 64, 128, 4, True, tf32=True).hoists
    assert (
        configs.score_config("sm_120", 64, 128, 2, True).hoists
        and configs.score_config("sm_90", 64, 64, 4, True, tf32=True).hoists
    )
    monkeypatch.setattr(configs, "gradient_config", lambda *_: Config(16, 16, 4, 1, hoists=hoists))
    given = [torch.randn(1, 2, 40, 20, dtype=torch.float64) for _ in range(3)]
    gradients = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        query, key, value = (tensor.to(dtype).requires_grad_() for tensor in given)
        (AttentionMap(query, key, backend=backend) @ value).square().sum().backward()
        gradients.append((query.grad, key.grad))
    for ours, plain, exact in zip(*gradients, strict=True):
        assert_within_budget(ours, plain, exact, torch.float32)


def test_rounded_products_of_float32_have_configurations_of_their_own(monkeypatch) -> None:
    asked = []

    def asking(rules):
        def ask(*arguments):
            asked.append((rules.__name__, arguments[-1]))
            return rules(*arguments)

        return ask

    names = ("apply_config", "adjoint_config", "gradient_config")
    for name in names:
        monkeypatch.setattr(configs, name, asking(getattr(configs, name)))
    query, key, value = (torch.randn(1, 2, 16, 16, requires_grad=True) for _ in range(3))
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            asked.clear()
            matmul.allow_tf32 = allowed
            (AttentionMap(query, key, backend="triton") @ value).sum().backward()
            assert set(asked) == {(name, allowed) for name in names}
    finally:
        matmul.allow_tf32 = before
