"""What only a device can show: real sizes, graph capture, offsets past 2³¹, memory. The contract runs there too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fpe_kernels import AttentionMap, blend, shared_attention
from fpe_kernels.testing import assert_matches, assert_within_budget, make, make_case

pytestmark = pytest.mark.gpu
HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
@pytest.mark.parametrize("map_index", [(0,), (0, 0), (0, 0, 0, 0, 0)], ids=str)
def test_real_sizes(head_dim: int, map_index: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(
        map_index=map_index,
        queries=4096,
        keys=4096,
        head_dim=head_dim,
        dtype=dtype,
        device="cuda",
        layout="heads_split",
    )
    leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value)]
    out = shared_attention(*leaves, map_index, backend="triton")
    grads = torch.autograd.grad(out, leaves, case.weight)
    _, logsumexp = torch.ops.fpe_kernels.apply(
        case.query, case.key, case.value, None, list(map_index), case.factor, "triton"
    )
    adjoint = torch.ops.fpe_kernels.adjoint(
        case.query, case.key, case.weight, None, logsumexp, list(map_index), case.factor, "triton"
    )
    assert_matches(case, out=out.detach(), logsumexp=logsumexp, adjoint=adjoint)
    assert_matches(case, grad_query=grads[0], grad_key=grads[1], grad_value=grads[2])


@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_the_layers_of_a_unet_with_an_unconditional_half(tokens: int) -> None:
    case = make_case(
        maps=3,
        map_index=(0, 1, 2, 2),
        heads=8,
        queries=tokens,
        keys=tokens,
        head_dim=80,
        dtype=torch.float16,
        device="cuda",
        layout="fused_chunk",
    )
    assert_matches(case, out=shared_attention(case.query, case.key, case.value, case.map_index))


def test_the_same_inputs_give_the_same_bits_a_hundred_times() -> None:
    case = make_case(
        map_index=(0,) * 9, heads=4, queries=1000, keys=1000, head_dim=40, dtype=torch.float16, device="cuda"
    )
    leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value)]
    first = None
    for _ in range(100):
        out = shared_attention(*leaves, case.map_index)
        results = (out, *torch.autograd.grad(out, leaves, case.weight))
        first = results if first is None else first
        assert all(torch.equal(result, expected) for result, expected in zip(results, first, strict=True))


def test_a_call_is_captured_in_a_graph() -> None:
    case = make_case(map_index=(0, 0), queries=256, keys=256, head_dim=64, dtype=torch.float16, device="cuda")
    query, key, value = (torch.empty_like(tensor) for tensor in (case.query, case.key, case.value))

    def call() -> torch.Tensor:
        return shared_attention(query, key, value, (0, 0))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for tensor, filled in zip((query, key, value), (case.query, case.key, case.value), strict=True):
        tensor.copy_(filled)
    graph.replay()
    torch.cuda.synchronize()
    assert_matches(case, out=out)


def test_a_regional_blend_is_captured_in_a_graph() -> None:
    tokens, inside = 1024, 400  # whole tiles of one map, of the other, and one of both
    source, target = (
        make_case(seed, heads=8, queries=tokens, keys=tokens, head_dim=40, dtype=torch.float16, device="cuda")
        for seed in (0, 10)
    )
    weight = torch.zeros(tokens, device="cuda")
    weight[:inside] = 1.0
    value = target.value

    def call() -> torch.Tensor:
        return blend(weight, *(AttentionMap(case.query, case.key) for case in (source, target))) @ value

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    borrowed = shared_attention(source.query, source.key, value, [0])
    # A kernel that takes no weights may serve this one, which rounds elsewhere.
    last_places = 2 * torch.finfo(torch.float16).eps * float(borrowed.abs().max())
    torch.testing.assert_close(out[:, :, :inside], borrowed[:, :, :inside], rtol=0, atol=last_places)
    assert_matches(target, out=torch.cat([target.plain["out"][:, :, :inside], out[:, :, inside:]], dim=2))


def products(query, key, value, weight):
    operator = AttentionMap(query, key)
    return operator @ value, operator.logsumexp, operator.T @ weight


def gradients(query, key, value, weight):
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    out = AttentionMap(*leaves[:2]) @ leaves[2]
    return torch.autograd.grad(out, leaves, weight)


def adjoint_first(query, key, value, weight):
    return (AttentionMap(query, key).T @ weight,)


@pytest.mark.parametrize("call", [products, gradients, adjoint_first])
def test_everything_is_captured_in_a_graph(call) -> None:
    names = {
        products: ("out", "logsumexp", "adjoint"),
        gradients: ("grad_query", "grad_key", "grad_value"),
        adjoint_first: ("adjoint",),
    }[call]
    case = make_case(heads=4, queries=256, keys=192, head_dim=40, dtype=torch.float16, device="cuda")
    filled = case.query, case.key, case.value, case.weight
    static = [torch.zeros_like(tensor) for tensor in filled]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(*static)
    for tensor, contents in zip(static, filled, strict=True):
        tensor.copy_(contents)
    graph.replay()
    torch.cuda.synchronize()
    assert_matches(case, **dict(zip(names, results, strict=True)))


def test_a_map_kept_from_before_a_capture_is_computed_in_it() -> None:
    case = make_case(heads=4, queries=256, keys=256, head_dim=64, dtype=torch.float16, device="cuda")
    query, key, value = (torch.zeros_like(tensor) for tensor in (case.query, case.key, case.value))
    operator = AttentionMap(query, key)
    operator @ value, operator @ value  # computed and kept; both ways are warm
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, second = operator @ value, operator @ value
    for tensor, filled in zip((query, key, value), (case.query, case.key, case.value), strict=True):
        tensor.copy_(filled)
    graph.replay()
    torch.cuda.synchronize()
    assert_matches(case, out=first)
    assert_matches(case, out=second)
    assert_matches(case, out=operator @ value)  # not from the graph's statistics


def test_a_capture_without_a_call_before_it_says_what_is_missing() -> None:
    case = make_case(heads=3, queries=129, keys=65, head_dim=24, dtype=torch.float16, device="cuda")
    with (
        pytest.raises(RuntimeError, match="Make the call once before capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        shared_attention(case.query, case.key, case.value, (0,))
    torch.cuda.synchronize()
    assert_matches(case, out=shared_attention(case.query, case.key, case.value, (0,)))


@pytest.mark.parametrize("training", [False, True])
def test_compiled_to_reduce_overhead(training: bool) -> None:
    # Tables that no call has made yet: the first call of a compiled function allocates from the graph's own pool.
    maps = 7
    case = make_case(
        maps=maps,
        map_index=(6, 5, 4, 3, 2, 1, 0, 6),
        heads=2,
        queries=128,
        keys=128,
        head_dim=72,
        dtype=torch.float16,
        device="cuda",
    )

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def compiled(query, key, value):
        return 1.0 * shared_attention(query, key, value, case.map_index)

    for _ in range(4):  # a warm-up, a recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        leaves = [tensor.clone().requires_grad_(training) for tensor in (case.query, case.key, case.value)]
        out = compiled(*leaves)
        assert_matches(case, out=out.detach().clone())
        if training:
            grads = torch.autograd.grad(out, leaves, case.weight)
            assert_matches(case, grad_query=grads[0], grad_key=grads[1], grad_value=grads[2])


def test_a_call_on_a_side_stream() -> None:
    case = make_case(map_index=(0, 0), queries=512, keys=512, head_dim=64, dtype=torch.float16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = shared_attention(case.query, case.key, case.value, (0, 0))
    torch.cuda.current_stream().wait_stream(stream)
    assert_matches(case, out=out)


def test_more_elements_than_31_bits_count() -> None:
    heads, tokens, dim = 8, 2**22 + 128, 64  # 2.15e9 elements, 4.3 GB each
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB of device memory")
    query = torch.empty(1, tokens, heads, dim, dtype=torch.float16, device="cuda").normal_().transpose(1, 2)
    key, value = (make((1, heads, 77, dim), seed, torch.float16, "cuda") for seed in (1, 2))
    assert query.numel() > 2**31
    out = shared_attention(query, key, value, [0])
    last = slice(tokens - 256, tokens)
    exact = F.scaled_dot_product_attention(query[:, :, last].double(), key.double(), value.double())
    plain = F.scaled_dot_product_attention(query[:, :, last], key, value)
    assert_within_budget(out[:, :, last], plain, exact, torch.float16)
    # The adjoint streams the long axis; a weight on its last rows alone must find them.
    weight = torch.zeros(1, heads, tokens, 1, dtype=torch.float16, device="cuda")
    weight[:, :, last] = 1.0
    seen = AttentionMap(query[:, :, last], key).T @ weight[:, :, last]
    exact = torch.softmax(query[:, :, last].double() @ key.double().mT * dim**-0.5, -1).mT @ weight[:, :, last].double()
    assert_within_budget(AttentionMap(query, key).T @ weight, seen, exact, torch.float16)


def test_entries_of_a_head_far_apart() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB of device memory")
    apart = 2**28
    memory = torch.empty(16 * apart + 64, dtype=torch.float16, device="cuda")
    case = make_case(heads=1, queries=9, keys=17, head_dim=16, dtype=torch.float16, device="cuda")
    far = memory.as_strided(case.query.shape, (0, 0, 1, apart), 0).copy_(case.query)
    assert_matches(case, out=shared_attention(far, case.key, case.value, [0]))


def test_one_pair_at_16384_tokens_takes_no_extra_memory() -> None:
    query, key = (make((1, 10, 16384, 64), seed, torch.float16, "cuda", "heads_split") for seed in (0, 1))
    value = make((2, 10, 16384, 64), 2, torch.float16, "cuda", "heads_split")
    shared_attention(query, key, value, (0, 0))  # compiles, and keeps the table
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = shared_attention(query, key, value, (0, 0))
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert extra < 2 << 20, f"{extra:,} bytes beyond inputs and outputs"


def test_auto_takes_triton_where_it_can_and_torch_where_not() -> None:
    from fpe_kernels import dispatch

    query = torch.empty(1, 1, 4, 64, device="cuda", dtype=torch.float16)
    assert dispatch.select("auto", query) == "triton"
    assert dispatch.select("auto", query.double()) == "torch"


def test_tf32_only_where_it_is_allowed() -> None:
    case = make_case(queries=512, keys=512, head_dim=64, device="cuda", amplitude=2.0)
    assert_matches(case, out=shared_attention(case.query, case.key, case.value, (0,), backend="triton"))
