"""Ready calls of the ``torch`` backend: the bits of the ordinary call, and never where that is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fpe_kernels import AttentionMap, ready, shared_attention, validation
from fpe_kernels.backends import blocks, cpu_threads, fused_cpu, whole_maps
from fpe_kernels.backends.blocks import Buffers

HEADS = 4
SHAPES = [
    ((0, 0), 64, 64, 40),  # one block, or PyTorch's fused attention where threads share it
    ((0, 0), 100, 24, 40),
    ((0, 0), 300, 300, 40),  # blocks of some heads, for threads
    ((0, 1, 2, 2), 300, 77, 64),  # maps of one row beside a shared one
    ((1, 0, 1), 65, 130, 24),
    ((0, 0), 700, 1024, 40),
]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def operands(
    map_index: tuple[int, ...], queries: int, keys: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    def heads(rows: int, tokens: int) -> Tensor:
        return torch.randn(rows, tokens, HEADS, dim, dtype=dtype).transpose(1, 2)

    maps = 1 + max(map_index)
    return heads(maps, queries), heads(maps, keys), heads(len(map_index), keys)


def refuse(*arguments: object, **named: object) -> None:
    raise AssertionError("the arguments of a ready call were checked again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("map_index", "queries", "keys", "dim"), SHAPES)
def test_the_second_call_gives_the_bits_of_the_first_without_its_checks(
    monkeypatch: pytest.MonkeyPatch, threads: int, map_index, queries: int, keys: int, dim: int, dtype: torch.dtype
) -> None:
    shapes = map_index, queries, keys, dim, dtype
    shared_attention(*operands(*shapes), map_index)  # other tensors of the same layout
    given = operands(*shapes)
    with torch.autograd.profiler.profile():  # which has it go the ordinary way
        expected = shared_attention(*given, map_index)
    monkeypatch.setattr(validation, "check_query_key", refuse)
    found = [shared_attention(*given, list(map_index)) for _ in range(2)]
    for out in found:
        assert torch.equal(out, expected)
        assert (out.shape, out.stride(), out.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert not out.requires_grad
    assert found[0].data_ptr() != found[1].data_ptr()


@pytest.mark.parametrize("allowed", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], ids=str)
def test_what_pytorch_may_use_for_its_own_attention_changes_nothing(allowed: SDPBackend) -> None:
    given = operands((0,), 300, 300, 40)
    expected = shared_attention(*given, (0,))
    with sdpa_kernel(allowed):
        assert torch.equal(shared_attention(*given, (0,)), expected)


def test_what_needs_the_dispatcher_is_not_ready() -> None:
    index = (0, 1, 2, 2)
    query, key, value = operands(index, 64, 64, 40)
    graph = torch.empty_like(query).requires_grad_()
    others = {
        "a graph": (graph, key, value, index, 0.3, "torch"),
        "a sign to be turned": (torch._neg_view(query), key, value, index, 0.3, "torch"),
        "a parameter": (torch.nn.Parameter(query, requires_grad=False), key, value, index, 0.3, "torch"),
        "numbers that equal an index": (query, key, value, (False, True, 2, 2), 0.3, "torch"),
        "another index": (query, key, value, (0, 1, 1, 2), 0.3, "torch"),
        "another scale": (query, key, value, index, None, "torch"),
        "another backend": (query, key, value, index, 0.3, "reference"),
        "other strides": (query, key, value.contiguous(), index, 0.3, "torch"),
        "another dtype": (query.double(), key.double(), value.double(), index, 0.3, "torch"),
        "more keys": (query, *(torch.cat([t, t], 2) for t in (key, value)), index, 0.3, "torch"),
        "another layout": (query.contiguous().to_mkldnn(), key, value, index, 0.3, "torch"),
    }
    arguments = query, key, value, index, 0.3, "torch"
    assert ready.call(*arguments) is None
    shared_attention(query, key, value, index, scale=0.3, backend="torch")
    assert ready.call(*arguments) is not None
    for what, given in others.items():
        assert ready.call(*given) is None, what
    with torch.no_grad():
        shared_attention(graph, key, value, index, scale=0.3, backend="torch")
        assert ready.call(*others["a graph"]) is not None
    assert ready.call(*others["a graph"]) is None
    modes: tuple[Callable, ...] = (
        lambda: torch.device("cpu"),
        lambda: FlopCounterMode(display=False),
        torch.autograd.profiler.profile,
        forward_ad.dual_level,
        lambda: torch.autocast("cpu", torch.bfloat16),
    )
    for mode in modes:
        with mode():
            assert ready.call(*arguments) is None, mode
    assert ready.call(*arguments) is not None


def test_another_number_of_threads_has_its_own_call() -> None:
    given = operands((0, 0), 64, 64, 40)
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert ready.call(*given, (0, 0), None, "auto") is None
            shared_attention(*given, (0, 0))
            assert ready.call(*given, (0, 0), None, "auto") is not None
        torch.set_num_threads(1)
        assert ready.call(*given, (0, 0), None, "auto") is not None
    finally:
        torch.set_num_threads(before)


def test_calls_that_differ_by_their_layouts_are_ready_side_by_side() -> None:
    given = operands((0, 0), 64, 64, 40)
    layouts = [given, tuple(tensor.contiguous() for tensor in given), tuple(tensor.double() for tensor in given)]
    for tensors in layouts:
        shared_attention(*tensors, (0, 0))
    for tensors in layouts:
        out = ready.call(*tensors, (0, 0), None, "auto")
        assert out is not None
        assert torch.equal(out, shared_attention(*tensors, (0, 0), backend="torch"))
        # In memory [B, N, H, E], whatever the operands are.
        assert out.transpose(1, 2).is_contiguous()
    for more in range(65, 65 + 2 * ready._ALTERNATIVES):
        tensors = tuple(torch.randn(tensor.shape[0], more, HEADS, 40).transpose(1, 2)[:, :, :64] for tensor in given)
        shared_attention(*tensors, (0, 0))
    (alternatives,) = (kept for name, kept in ready._READY.items() if name[1] == given[0].shape and name[3] == "auto")
    assert len(alternatives) == ready._ALTERNATIVES


def test_blocks_that_are_longer_than_a_call_are_not_kept() -> None:
    given = operands((0, 0), 400, 2100, 8)
    shared_attention(*given, (0, 0))
    assert ready.call(*given, (0, 0), None, "auto") is None
    halves = [tensor.half() for tensor in operands((0, 0), 40, 40, 8)]
    shared_attention(*halves, (0, 0))
    assert ready.call(*halves, (0, 0), None, "auto") is None


def test_gradients_and_the_log_sum_exp_beside_ready_calls(threads: int) -> None:
    query, key, value = operands((0, 0), 300, 300, 40)
    for _ in range(2):
        shared_attention(query, key, value, (0, 0))
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    shared_attention(*leaves, (0, 0)).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    exact = (40**-0.5 * query.double() @ key.double().mT).logsumexp(-1)
    torch.testing.assert_close(AttentionMap(query, key).logsumexp.double(), exact, rtol=2e-6, atol=2e-6)


def test_inference_mode_inside_and_outside(threads: int) -> None:
    given = operands((0, 0), 300, 300, 40)
    expected = shared_attention(*given, (0, 0))
    Buffers.forget()
    with torch.inference_mode():  # which makes the buffers that calls outside take over
        inside = shared_attention(*given, (0, 0))
    outside = shared_attention(*given, (0, 0))
    assert inside.is_inference() and not outside.is_inference()
    assert torch.equal(inside, expected) and torch.equal(outside, expected)


def test_several_callers_of_one_ready_call(threads: int) -> None:
    given = [operands((0, 0), 200, 200, 40) for _ in range(4)]
    expected = [shared_attention(*tensors, (0, 0)) for tensors in given]
    found: dict[int, list[Tensor]] = {}

    def call(number: int) -> None:
        torch.set_num_threads(threads)
        found[number] = [shared_attention(*given[number], (0, 0)) for _ in range(20)]

    callers = [threading.Thread(target=call, args=(number,)) for number in range(len(given))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for number, outs in found.items():
        for out in outs:
            assert torch.equal(out, expected[number])
    assert len(found) == len(given)


class TestKeptBuffers:
    def test_a_call_takes_the_memory_of_the_one_before(self, threads: int) -> None:
        Buffers.forget()
        given = operands((0, 0), 300, 300, 40)
        shared_attention(*given, (0, 0))
        kept = {buffer.data_ptr() for buffer in Buffers._kept}
        assert kept
        for _ in range(3):
            shared_attention(*given, (0, 0))
        assert kept <= {buffer.data_ptr() for buffer in Buffers._kept} and len(Buffers._kept) <= threads

    def test_there_is_an_end_to_what_is_kept(self) -> None:
        like = torch.empty(0)
        many = [Buffers() for _ in range(3 * blocks.KEPT_BYTES // blocks.THREAD_BLOCK_BYTES)]
        for buffers in many:
            buffers.view((1, 8, 8), like)
        for buffers in many:
            buffers.release()
        assert Buffers.kept_bytes() == blocks.KEPT_BYTES
        Buffers.forget()
        assert Buffers.kept_bytes() == 0

    def test_nobody_has_memory_that_another_call_has(self) -> None:
        like, one, other = torch.empty(0), Buffers(), Buffers()
        mine, theirs = one.view((1, 8, 8), like), other.view((1, 8, 8), like)
        assert mine.data_ptr() != theirs.data_ptr()
        one.release()
        third = Buffers().view((1, 4, 4), like)
        assert third.data_ptr() == mine.data_ptr() != theirs.data_ptr()

    @pytest.mark.parametrize(
        "make",
        [
            lambda: Buffers().view((1, 1, blocks.THREAD_BLOCK_BYTES // 4 + 1), torch.empty(0)),
            lambda: Buffers().view((1, 8, 8), torch.empty(0, dtype=torch.float64)),
            lambda: Buffers().view((1, 8, 8), torch.empty(0, device="meta")),
        ],
        ids=["larger", "float64", "another device"],
    )
    def test_other_memory_is_not_kept(self, make: Callable[[], Tensor]) -> None:
        Buffers.forget()
        make()
        assert Buffers.kept_bytes() == 0

    def test_who_counts_allocations_sees_them(self) -> None:
        from benchmarks.memory import peak_bytes

        given = operands((0, 0), 500, 500, 16)
        shared_attention(*given, (0, 0))
        scores = 500 * 500 * 4
        assert peak_bytes(lambda: shared_attention(*given, (0, 0))) >= scores


def test_threads_have_a_part_each_where_a_map_is_large_enough(threads: int) -> None:
    for tokens in (100, 300):
        query, key, _ = operands((0, 0), tokens, tokens, 40)
        parts = len(list(blocks.cut_maps(query, key, [(0, 1)], (tokens,))))
        shared = threads > 1 and cpu_threads.threads_compute_alone() and tokens == 300
        assert parts == (threads if shared else 1)


def test_a_tiny_map_is_one_call_where_threads_share_it(threads: int) -> None:
    given = operands((0, 0), 64, 64, 160)
    runs, left = fused_cpu.runs(*given, [(0, 1)], (64,))
    assert (len(runs), left) == ((1, [()]) if threads > 1 else (0, [(0, 1)]))
    product = whole_maps.ready_call(*given, (0, 0), 0.1, torch.empty(2, 64, HEADS, 160).transpose(1, 2))
    assert product is not None
