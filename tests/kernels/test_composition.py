"""Every edit of the literature as linear algebra of maps, against the same algebra on dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpe_kernels import AttentionMap, blend, concatenate
from fpe_kernels.testing import assert_within_budget
from tests.support.composed_edits import EDITS, Tensors, check, maker


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("backend_name", ["reference", "torch"])
def test_edits_are_their_dense_equations_in_float64(name: str, backend_name: str) -> None:
    tensors = Tensors.make(torch.float64)
    found = EDITS[name].lazy(tensors, maker(backend_name))
    check(found, EDITS[name], tensors)
    torch.testing.assert_close(found, EDITS[name].dense(tensors), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EDITS)
def test_edits_in_half_precision(name: str) -> None:
    tensors = Tensors.make(torch.float16)
    check(EDITS[name].lazy(tensors, maker("torch")), EDITS[name], tensors)


@pytest.mark.parametrize("name", EDITS)
def test_edits_through_the_kernels(name: str, triton_device: str) -> None:
    tensors = Tensors.make(torch.float32, triton_device)
    check(EDITS[name].lazy(tensors, maker("triton")), EDITS[name], tensors)


@pytest.fixture
def triton_device() -> str:
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("backend_name", ["reference", "torch"])
def test_gradients_of_edits(name: str, backend_name: str) -> None:
    leaves = Tensors.make(torch.float64)
    for tensor in vars(leaves).values():
        tensor.requires_grad_()
    seed = torch.cos(torch.arange(EDITS[name].dense(leaves).numel(), dtype=torch.float64))

    def gradients(result: Tensor) -> tuple:
        return torch.autograd.grad(result.flatten(), list(vars(leaves).values()), seed, allow_unused=True)

    found = gradients(EDITS[name].lazy(leaves, maker(backend_name)))
    for field, grad, exact in zip(vars(leaves), found, gradients(EDITS[name].dense(leaves)), strict=True):
        assert (grad is None) == (exact is None), field
        if grad is not None:
            # Some entries, as of a key against softmax, are differences of terms far larger than they are.
            magnitude = max(1.0, 10 * float(exact.abs().max()))
            assert_within_budget(grad, exact, exact, torch.float64, magnitude, scores=100.0, name=field)


@pytest.mark.parametrize("backend_name", ["reference", "torch"])
def test_combinations_compile_into_one_graph_with_gradients(backend_name: str) -> None:
    t = Tensors.make(torch.float64)
    leaves = [t.q_src, t.k_src, t.q_tgt, t.k_tgt, t.v_tgt, t.mask]

    def edited(q_src, k_src, q_tgt, k_tgt, v_tgt, mask) -> Tensor:
        source = AttentionMap(q_src, k_src, backend=backend_name).take([0, 0])
        target = AttentionMap(q_tgt, k_tgt, backend=backend_name)
        regional = blend(mask, source, target)
        return concatenate([source, regional.scale_columns(mask)]).matmul(torch.cat([v_tgt, v_tgt]))

    for leaf in leaves:
        leaf.requires_grad_()
    expected = edited(*leaves)
    compiled = torch.compile(edited, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(compiled.square().sum(), leaves)
    for grad, exact in zip(found, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(grad, exact, rtol=0, atol=1e-12)
