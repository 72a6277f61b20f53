"""The way from a call to a launch: alignments, addresses, streams, graphs, hooks, devices.

A call's launches are worked out once for each layout and replayed with new addresses; what that could get wrong is not
seen by computing each problem once. Every function returns its largest error beside what it allows, and raises where it
cannot be run at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpe_kernels import shared_attention
from fpe_kernels.testing import Case, make_case
from fpe_kernels.testing.budget import error_budget, worst_error
from fpe_kernels.testing.cases import score_magnitude

from ..workers.problems import Problem

PAIR = Problem((0, 0), 256, 256, 64, heads=4)
UNEVEN = Problem((0, 1, 1, 0), 96, 80, 40, heads=2)
LONGER = Problem((0, 0), 1024, 1024, 64, heads=8)
PROBLEMS = (PAIR, UNEVEN, LONGER)

Verdict = dict[str, float]


def _case(problem: Problem, device: str, seed: int = 0) -> Case:
    return make_case(
        seed,
        maps=problem.maps,
        map_index=problem.map_index,
        heads=problem.heads,
        queries=problem.queries,
        keys=problem.keys,
        head_dim=problem.head_dim,
        dtype=torch.float16,
        device=device,
        layout="heads_split",
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, case: Case, backend: str) -> Tensor:
    return shared_attention(query, key, value, case.map_index, backend=backend)


def _judged(case: Case, *outs: Tensor) -> Verdict:
    budget = error_budget(
        case.plain["out"], case.exact["out"], case.query.dtype, case.magnitude["out"], score_magnitude(case)
    )
    error = max(worst_error(out, case.exact["out"]) for out in outs)
    if not error <= budget:
        raise AssertionError(f"error {error:.3e} against float64 passes the budget of {budget:.3e}")
    return {"error": error, "budget": budget}


def shifted_by_one_element(device: str, backend: str) -> Verdict:
    """Queries aligned, one element further, aligned again, and at other offsets."""
    case = _case(PAIR, device)
    batch, heads, tokens, dim = case.query.shape
    memory = torch.empty(case.query.numel() + 8, device=device, dtype=case.query.dtype)
    outs = []
    for offset in (0, 1, 0, 8, 3, 0):
        query = memory[offset : offset + case.query.numel()].view(batch, tokens, heads, dim).transpose(1, 2)
        outs.append(_attend(query.copy_(case.query), case.key, case.value, case, backend))
    return _judged(case, *outs)


def other_addresses(device: str, backend: str) -> Verdict:
    """The same layout at new addresses with other contents."""
    worst: Verdict = {"error": 0.0, "budget": 0.0}
    held = []
    for seed in range(4):
        case = _case(UNEVEN, device, 10 * seed)
        held.append(case)
        verdict = _judged(case, _attend(case.query, case.key, case.value, case, backend))
        worst = max(worst, verdict, key=lambda one: one["error"])
    return worst


def same_bits_again(device: str, backend: str) -> Verdict:
    """The same call three times."""
    case = _case(LONGER, device)
    first, *others = (_attend(case.query, case.key, case.value, case, backend) for _ in range(3))
    if not all(torch.equal(first, other) for other in others):
        raise AssertionError("the same inputs gave other bits")
    return _judged(case, first)


def side_stream(device: str, backend: str) -> Verdict:
    """A call on a stream that is not the default one."""
    case = _case(PAIR, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = _attend(case.query, case.key, case.value, case, backend)
    torch.cuda.current_stream().wait_stream(stream)
    return _judged(case, out)


def graph_with_other_contents(device: str, backend: str) -> Verdict:
    """Captured in a CUDA graph, replayed after its inputs have changed."""
    case = _case(PAIR, device)
    query, key, value = (torch.zeros_like(tensor) for tensor in (case.query, case.key, case.value))
    _attend(query, key, value, case, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _attend(query, key, value, case, backend)
    for tensor, contents in zip((query, key, value), (case.query, case.key, case.value), strict=True):
        tensor.copy_(contents)
    graph.replay()
    return _judged(case, out)


def compiled_whole(device: str, backend: str) -> Verdict:
    """Inside `torch.compile(fullgraph=True)`."""
    case = _case(PAIR, device)
    function = torch.compile(lambda q, k, v: 1.0 * _attend(q, k, v, case, backend), fullgraph=True)
    return _judged(case, function(case.query, case.key, case.value))


def pre_run_hook(device: str, backend: str) -> Verdict:
    """Triton's hook before a launch, of which profilers are made, is called for replayed launches too."""
    from fpe_kernels.backends.triton.apply import apply_kernel

    case = _case(PAIR, device)
    _attend(case.query, case.key, case.value, case, backend)
    calls: list[int] = []
    apply_kernel.add_pre_run_hook(lambda *args, **kwargs: calls.append(1))
    try:
        outs = [_attend(case.query, case.key, case.value, case, backend) for _ in range(2)]
    finally:
        apply_kernel.pre_run_hooks.clear()
    if len(calls) != len(outs):
        raise AssertionError(f"{len(outs)} launches called the hook {len(calls)} times")
    return _judged(case, *outs)


def second_device(device: str, backend: str) -> Verdict:
    """Tensors of another device than the current one."""
    case = _case(PAIR, "cuda:1")
    with torch.cuda.device(0):
        return _judged(case, _attend(case.query, case.key, case.value, case, backend))


ANYWHERE = (shifted_by_one_element, other_addresses, same_bits_again)
ON_CUDA = (side_stream, graph_with_other_contents, pre_run_hook, compiled_whole)
