"""Launches that are worked out once must serve every later call of the same layout, whatever its tensors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from fpe_kernels import AttentionMap, shared_attention
from fpe_kernels.backends.triton import configs, gradient_launch
from fpe_kernels.backends.triton.configs import Config
from fpe_kernels.backends.triton.launch import Launch
from fpe_kernels.testing import assert_within_budget


def test_a_launch_remembered_from_aliased_tensors_serves_distinct_ones() -> None:
    x, y, value = (torch.randn(1, 2, 16, 16) for _ in range(3))
    for query, key in ((x, x), (x, y), (y, x)):
        out = AttentionMap(query, key, backend="triton") @ value
        exact = AttentionMap(query.double(), key.double(), backend="reference") @ value.double()
        plain = AttentionMap(query, key, backend="reference") @ value
        assert_within_budget(out, plain, exact, torch.float32)


def test_a_scale_that_is_zero_in_float32_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel on a device gets it so; the interpreter hands on the float of Python."""
    arguments = Launch._arguments

    def rounded(launch: Launch) -> dict[str, object]:
        given = arguments(launch)
        return given | {"scale": float(torch.tensor(given["scale"], dtype=torch.float32))}

    monkeypatch.setattr(Launch, "_arguments", rounded)
    query, key, value = torch.randn(3, 1, 1, 33, 16)
    for scale in (1e-50, 1e-40, 0.0):
        out = shared_attention(query, key, value, [0], scale=scale, backend="triton")
        torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out), rtol=0, atol=1e-6)


def test_the_compiler_is_told_what_configurations_are_made_for() -> None:
    """Among it that products and sums are one instruction, which Triton 3.9 warns of and later ones leave out."""
    told = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert Config(64, 64, 4, 2).options == told
    assert Config(64, 64, 4, 2, maxnreg=168).options == {**told, "maxnreg": 168}


def test_tables_and_layouts_are_part_of_what_is_remembered() -> None:
    query, key = torch.randn(2, 2, 2, 16, 16)
    value = torch.randn(2, 2, 16, 16)
    for map_index in ([0, 1], [1, 0], [0, 0], [1, 1]):
        for laid_out in (value, value.transpose(1, 2).contiguous().transpose(1, 2)):
            out = shared_attention(query, key, laid_out, map_index, backend="triton")
            exact = shared_attention(query.double(), key.double(), value.double(), map_index, backend="reference")
            plain = shared_attention(query, key, value, map_index, backend="reference")
            assert_within_budget(out, plain, exact, torch.float32)


def test_gradients_of_float32_are_not_rounded_where_that_is_no_faster(monkeypatch) -> None:
    ruled = [configs.score_config(arch, 64, 128, 4, True, tf32=True) for arch in ("sm_120", "sm_90")]
    assert (
        [config.exact for config in ruled] == [True, False] != [configs.score_config("sm_120", 64, 64, 2, True).exact]
    )
    assert ruled[0] == configs.score_config("sm_120", 64, 128, 4, True)
    asked = []
    plain = gradient_launch.Launch
    monkeypatch.setattr(
        gradient_launch, "Launch", lambda *given, **named: asked.append(named) or plain(*given, **named)
    )
    query, key, value = (torch.randn(1, 2, 16, 16, requires_grad=True) for _ in range(3))
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        for exact in (True, False):
            monkeypatch.setattr(configs, "gradient_config", lambda *_, exact=exact: Config(16, 16, 4, 1, exact=exact))
            (AttentionMap(query, key, backend="triton") @ value).sum().backward()
    finally:
        matmul.allow_tf32 = before
    assert [named["constants"]["PRECISION"] for named in asked] == ["ieee", "ieee", "tf32", "tf32"]


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
