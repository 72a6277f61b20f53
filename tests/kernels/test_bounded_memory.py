"""No map is ever stored, unless it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import peak_bytes
from fpe_kernels import AttentionMap, LinearMap, join, ops, shared_attention
from fpe_kernels.testing import Case, assert_matches, make, make_case

TOKENS = 2048
MAP_BYTES = 2 * TOKENS * TOKENS * 4  # one map of two heads


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that any PyTorch call returns, inside the ops of fpe_kernels too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fpe_kernels":
            # What runs inside an op is hidden from a mode, so its implementation is called with the mode on.
            implementation = getattr(ops, "_" + func.overloadpacket.__name__)
            with self:
                return implementation(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def largest_in(call: Callable[[], object]) -> int:
    with Largest() as seen:
        call()
    return seen.bytes


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(map_index=(0, 0), queries=TOKENS, keys=TOKENS, head_dim=8)


def backward(case: Case, bias: Tensor | None = None) -> None:
    leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value)]
    extra = [] if bias is None else [bias.detach().requires_grad_()]
    out = shared_attention(*leaves, case.map_index, bias=extra[0] if extra else None)
    torch.autograd.grad(out, leaves + extra, case.weight)


def regional(case: Case, bias: Tensor) -> Tensor:
    weight = (torch.arange(TOKENS) % 2).float()
    return shared_attention(case.query, case.key, case.value, case.map_index, bias=bias, weight=weight)


def joined(case: Case) -> LinearMap:
    """A part that two rows share, and private parts of either."""
    query = case.query.expand(2, -1, -1, -1)
    private = AttentionMap(query, torch.cat([case.key, 2.0 * case.key])[:, :, :100])
    return join([private, AttentionMap(case.query, case.key[:, :, 100:]).take([0, 0])])


def joined_backward(case: Case) -> None:
    leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value)]
    query, key, value = leaves
    parts = [AttentionMap(query, key[:, :, :100]), AttentionMap(query, key[:, :, 100:], key_lengths=[TOKENS - 150])]
    torch.autograd.grad(join(parts).take([0, 0]) @ value, leaves, case.weight)


@pytest.mark.parametrize(
    "call",
    [
        lambda case: joined(case) @ case.value,
        lambda case: joined(case).T @ case.weight,
        lambda case: joined(case).logsumexp,
        lambda case: joined(case).rows([0, 5]),
        lambda case: joined(case).columns([0, 500]),
        lambda case: joined(case).block((0, 1000), (50, 1500)) @ case.value[:, :, 50:1500],
        joined_backward,
        lambda case: shared_attention(case.query, case.key, case.value, case.map_index),
        lambda case: AttentionMap(case.query, case.key).logsumexp,
        lambda case: AttentionMap(case.query, case.key).T @ case.weight[:1],
        lambda case: AttentionMap(case.query, case.key).column_sums(),
        lambda case: AttentionMap(case.query, case.key).pooled((32, 64), (64, 32), 4),
        lambda case: AttentionMap(case.query, case.key).rows([0, 5]),
        lambda case: AttentionMap(case.query, case.key).columns([0, 5]),
        backward,
        lambda case: backward(case, torch.zeros(1, 1, 1, TOKENS)),
        lambda case: regional(case, torch.zeros(1, 1, 1, TOKENS)),
        lambda case: regional(case, torch.zeros(1, 1, TOKENS, 1)),
    ],
    ids=[
        "joined",
        "joined adjoint",
        "joined logsumexp",
        "joined rows",
        "joined columns",
        "block of a joined",
        "joined backward",
        "shared",
        "logsumexp",
        "adjoint",
        "column_sums",
        "pooled",
        "rows",
        "columns",
        "backward",
        "bias gradient",
        "weighted with key padding",
        "weighted with a bias of the queries",
    ],
)
def test_no_tensor_comes_near_the_size_of_a_map(call: Callable[[Case], object], case: Case) -> None:
    # Blocks of scores take 2 MiB whatever the number of tokens; a map of this case takes 32 MiB.
    assert largest_in(lambda: call(case)) <= 2 << 20 < MAP_BYTES // 8


def test_the_measure_sees_a_map(case: Case) -> None:
    operator = AttentionMap(case.query, case.key)
    assert largest_in(operator.dense) >= MAP_BYTES
    assert largest_in(lambda: AttentionMap(case.query, case.key, backend="reference").logsumexp) >= MAP_BYTES


def test_dense_is_never_implicit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("dense() was called")

    monkeypatch.setattr(AttentionMap, "dense", refuse)
    case = make_case(queries=16, keys=16)
    operator = AttentionMap(case.query, case.key)
    operator @ case.value, operator.T @ case.weight, operator.rows(0), operator.columns(0), operator.column_sums()
    operator.pooled((4, 4), (4, 4), 2), operator[0], operator.to(torch.float64), operator.detach(), repr(operator)


def test_offsets_past_31_bits(tmp_path: Path) -> None:
    """Operands whose batch rows lie 2³¹ elements apart, in a sparse file: memory that nothing touches is not there."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter's part; tests/kernels/test_gpu.py does this on a device")
    apart = 2**31 + 64
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2 * (2 * apart + 2**20))
    memory = torch.from_file(str(path), shared=True, size=2 * apart + 2**20, dtype=torch.float16)
    case = make_case(maps=2, map_index=(1, 1), heads=1, queries=9, keys=17, head_dim=8, dtype=torch.float16)

    def far(tensor: Tensor, offset: int) -> Tensor:
        tokens, dim = tensor.shape[2:]
        view = memory.as_strided(tensor.shape, (apart, tokens * dim, dim, 1), offset)
        return view.copy_(tensor)

    query, key, value = (far(t, 4096 * i) for i, t in enumerate((case.query, case.key, case.value)))
    out, logsumexp = torch.ops.fpe_kernels.apply(query, key, value, None, [1, 1], case.factor, "triton")
    assert_matches(case, out=out, logsumexp=logsumexp)
    weight = far(case.weight, 4096 * 4)
    adjoint = torch.ops.fpe_kernels.adjoint(query, key, weight, None, logsumexp, [1, 1], case.factor, "triton")
    assert_matches(case, adjoint=adjoint)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    grads = torch.autograd.grad(shared_attention(*leaves, [1, 1], backend="triton"), leaves, weight)
    assert_matches(case, grad_query=grads[0], grad_key=grads[1], grad_value=grads[2])


def test_entries_far_apart(tmp_path: Path) -> None:
    """A head dim whose entries lie 2²⁸ elements apart: the offset of entry 8 passes 2³¹."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("memory of this machine, not of the device")
    apart = 2**28
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2 * (16 * apart + 2**20))
    memory = torch.from_file(str(path), shared=True, size=16 * apart + 2**20, dtype=torch.float16)
    case = make_case(heads=1, queries=9, keys=17, head_dim=16, dtype=torch.float16)
    far = memory.as_strided(case.query.shape, (0, 0, 1, apart), 0).copy_(case.query)
    out = shared_attention(far, case.key, case.value, [0], backend="triton")
    assert_matches(case, out=out)


def test_make_keeps_the_strides_of_its_layout() -> None:
    assert make((2, 3, 4, 8), layout="batch_expanded").stride(0) == 0
    assert make((2, 3, 4, 8), layout="heads_expanded").stride(1) == 0
    assert make((2, 3, 4, 8), layout="fused_chunk").stride() == (4 * 72, 8, 72, 1)
    assert make((2, 3, 4, 8), layout="channels_first", dtype=torch.float16).stride(3) == 4


def test_a_joined_pair_grows_with_its_tokens():
    """Twice the image's tokens, twice the memory beside the result's: no part of it goes with their square."""

    def peak(tokens: int) -> int:
        query, key, value = torch.randn(3, 2, 2, tokens, 16)
        text_key, text_value = torch.randn(2, 2, 2, 77, 16)
        pair = join([AttentionMap(query, key, backend="torch"), AttentionMap(query, text_key, backend="torch")])
        values = torch.cat([value, text_value], dim=2)
        return peak_bytes(lambda: pair @ values)

    small, large = peak(TOKENS), peak(2 * TOKENS)
    assert large <= 2.2 * small
    assert large < MAP_BYTES


def test_the_gradient_of_a_bias_is_held_once():
    query, key, value = (make((1, 1, TOKENS, 8), seed) for seed in range(3))
    bias = torch.zeros(TOKENS, TOKENS, requires_grad=True)
    out = AttentionMap(query, key, bias=bias) @ value
    peak = peak_bytes(lambda: torch.autograd.grad(out, bias, torch.ones_like(out), retain_graph=True))
    assert peak < 1.5 * bias.nbytes
