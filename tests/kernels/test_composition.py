"""Every edit of the literature as linear algebra of maps, against the same algebra on dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpe_kernels import AttentionMap, blend, concatenate, join
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


@pytest.mark.slow
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


def test_a_combination_moves_with_its_weights_and_mixings():
    A, B = (AttentionMap(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)) for _ in range(2))
    weighted = A.scale_rows(torch.rand(5)).mix(torch.rand(7, 3)) + B.scale_columns(torch.rand(7)).mix(torch.rand(7, 3))
    value = torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(weighted.to("cpu") @ value, weighted @ value, rtol=0, atol=0)
    moved = weighted.to("meta")
    assert moved.device.type == "meta" and moved.shape == weighted.shape
    assert {term.factors[-1].matrix.device.type for block in moved._blocks() for term in block.terms} == {"meta"}
    assert moved._blocks()[0].terms[0].row_weight.device.type == "meta"
    wide = weighted.to(torch.float64)
    assert wide.dtype == torch.float64
    torch.testing.assert_close((wide @ value.double()).float(), weighted @ value)
    with pytest.raises(TypeError, match="a combination of KeyBlock stays on its device"):
        A.block(keys=(0, 2)).to("meta")


@pytest.mark.parametrize("strict", [True, False])
def test_operators_between_maps_and_tensors_are_exported(strict: bool) -> None:
    class Edited(torch.nn.Module):
        def forward(self, query, key, value, weight) -> Tensor:
            A = AttentionMap(query, key)
            return (weight * join([A.keys(0, 2), A.keys(2)])) @ value + A.T @ query

    operands = [torch.randn(1, 2, 6, 4) for _ in range(3)]
    tokens = torch.export.Dim("tokens", min=4)
    shapes = ({2: tokens}, {2: tokens}, {2: tokens}, {0: tokens})
    exported = torch.export.export(Edited(), (*operands, torch.rand(6)), strict=strict, dynamic_shapes=shapes)
    longer = [*(torch.randn(1, 2, 9, 4) for _ in range(3)), torch.rand(9)]
    torch.testing.assert_close(exported.module()(*longer), Edited()(*longer))
