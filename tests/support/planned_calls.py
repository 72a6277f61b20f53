"""A call that is planned already makes the launches that it would make anew. test_plans.py runs this as a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fpe_kernels import ready, shared_attention, validation
from fpe_kernels.backends.protocol import Factors, Maps
from fpe_kernels.backends.triton import backend, configs, plans
from fpe_kernels.backends.triton import gradients as gradient_launches
from fpe_kernels.backends.triton.apply import apply_kernel
from fpe_kernels.backends.triton.gradient_launch import GradientTensors
from tests.support.recorded_launches import Recorded, RecordingDriver

HEADS, TOKENS = 2, 64
Call = Callable[[], None]


def heads_split(batch: int, tokens: int, dim: int, offset: int = 0, dtype: torch.dtype = torch.half) -> Tensor:
    """[batch, HEADS, tokens, dim] as a projection leaves it, ``offset`` elements into its memory."""
    memory = torch.empty(batch * tokens * HEADS * dim + offset, dtype=dtype)[offset:]
    return memory.view(batch, tokens, HEADS, dim).transpose(1, 2)


def product(
    map_index: tuple[int, ...] = (0, 0),
    dim: int = 16,
    queries: int = TOKENS,
    keys: int = TOKENS,
    offset: int = 0,
    known: bool = False,
    bias: tuple[int, ...] | None = None,
    weight: tuple[int, ...] | None = None,
    value_dim: int | None = None,
) -> Call:
    maps, columns = 1 + max(map_index), dim if value_dim is None else value_dim
    query, key = heads_split(maps, queries, dim, offset), heads_split(maps, keys, dim, offset)
    value, out = heads_split(len(map_index), keys, columns), heads_split(len(map_index), queries, columns)
    rest = torch.empty(maps, HEADS, queries), known, None if weight is None else torch.empty(weight)
    full_bias = None if bias is None else torch.empty(bias, dtype=torch.half)
    return lambda: backend.apply(Maps(query, key, full_bias, map_index, 0.1), value, out, *rest)


def merged() -> Call:
    """A private part of two maps that takes up the product of a shared one."""
    query, key, value = heads_split(2, TOKENS, 16), heads_split(2, 33, 16), heads_split(2, 33, 16)
    out, prior = heads_split(2, TOKENS, 16), heads_split(2, TOKENS, 16, dtype=torch.float32)
    statistics, others = torch.empty(2, HEADS, TOKENS), torch.empty(2, HEADS, TOKENS)
    maps = Maps(query, key, None, (0, 1), 0.1, (33, 20))
    return lambda: backend.apply_merged(maps, value, out, statistics, False, None, prior, others)


def lengths() -> Call:
    query, value = heads_split(2, TOKENS, 16), heads_split(2, TOKENS, 16)
    out, statistics = heads_split(2, TOKENS, 16), torch.empty(2, HEADS, TOKENS)
    maps = Maps(query, query, None, (0, 1), 0.1, (TOKENS, 20))
    return lambda: backend.apply(maps, value, out, statistics, False)


def adjoint() -> Call:
    query, weight, logsumexp = heads_split(1, TOKENS, 40), heads_split(2, TOKENS, 40), torch.empty(1, HEADS, TOKENS)
    out = torch.empty_like(weight)
    return lambda: backend.adjoint(Maps(query, query, None, (0, 0), 0.1), weight, out, logsumexp)


def gradients() -> Call:
    query, factor = heads_split(1, TOKENS, 40), heads_split(2, TOKENS, 40)
    logsumexp, out = torch.empty(1, HEADS, TOKENS), heads_split(1, TOKENS, 40)
    factors = Factors(factor, factor, logsumexp, logsumexp)
    return lambda: backend.score_gradient(Maps(query, query, None, (0, 0), 0.1), factors, out, out)


def gradient_of_six() -> Call:
    query, factor = heads_split(1, TOKENS, 40), heads_split(6, TOKENS, 40)
    logsumexp, total = torch.empty(1, HEADS, TOKENS), heads_split(1, TOKENS, 40, dtype=torch.float32)
    tensors = GradientTensors(query, query, factor, factor, None, total, logsumexp, logsumexp)
    settings = gradient_launches.GradientSettings((0,) * 6, 0.1, None, True, configs.gradient_config)
    return lambda: plans.launch_all(gradient_launches.plan, tensors, settings)


CALLS: dict[str, Callable[[], Call]] = {
    "a pair": product,
    "addresses that are no multiples of 16 bytes": lambda: product(offset=1),
    "addresses that are again": lambda: product(offset=8),
    "sizes of one": lambda: product(keys=1, queries=1),
    "odd sizes": lambda: product(keys=77, queries=65),
    "a mixed batch": lambda: product((0, 1, 2, 2)),
    "several chunks": lambda: product((0,) * 3, dim=160),
    "replay": lambda: product(known=True),
    "a bias": lambda: product(bias=(1, 1, 1, TOKENS)),
    "weights": lambda: product(weight=(1, 1, TOKENS)),
    "a joined part": merged,
    "lengths of the keys": lengths,
    "a transpose": adjoint,
    "gradients": gradients,
    "a gradient in two chunks": gradient_of_six,
}


def launched(call: Call) -> list[Recorded]:
    call()
    return RecordingDriver.taken()


def refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("a planned call was worked out again")


def planned(call: Call) -> list[Recorded]:
    """What ``call`` launches; checks that nothing is compiled or bound for it."""
    run, triton.JITFunction.run = triton.JITFunction.run, refuse
    try:
        return launched(call)
    finally:
        triton.JITFunction.run = run


def anew(call: Call) -> list[Recorded]:
    plans.forget()
    return launched(call)


def check_a_planned_call_is_the_call_made_anew() -> None:
    functions = {}
    for name, make in CALLS.items():
        first, second = make(), make()  # other tensors of the same layout
        assert launched(first), name
        known = planned(second)
        assert known == anew(second) != launched(first), name
        functions[name] = known[0].function
    assert functions["a pair"] == functions["addresses that are again"]
    assert len({functions[name] for name in [*list(CALLS)[:2], "sizes of one", "odd sizes"]}) == 4


def check_descriptors() -> None:
    rule = configs.apply_config
    configs.apply_config = cache(lambda *arguments: replace(rule(*arguments), descriptors=True))
    try:
        first, second = product(dim=64), product(dim=64)
        (described,) = launched(first)
        assert isinstance(described.arguments["query"], tuple)
        assert planned(second) == anew(second) != [described]
    finally:
        configs.apply_config = rule
    assert "query_ptr" in launched(first)[0].arguments  # by the rule again


def check_the_kernel_for_hopper() -> None:
    rule = configs.apply_config
    asked = configs.Config(128, 64, 4, 2, gluon=True)
    configs.apply_config = lambda *arguments: asked
    try:
        # Two pieces of a head; more branches than a launch holds; a known log-sum-exp.
        for make in (lambda: product(dim=40), lambda: product((0,) * 5, dim=64), lambda: product(dim=64, known=True)):
            first, second = make(), make()
            recorded = launched(first)
            assert all("query_0" in launch.arguments for launch in recorded)
            assert planned(second) == anew(second) != recorded
        (halves,) = launched(product(dim=40))
        boxes = {name: halves.arguments[name] for name in ("query_0", "query_1", "key_1", "value_1")}
        assert [box[3] for box in boxes.values()] == [[1, 1, 64, 32], [1, 1, 64, 16], [1, 1, 64, 16], [1, 1, 64, 16]]
        first, second = launched(product((0,) * 5, dim=64))
        assert (first.arguments["BRANCHES"], first.arguments["KNOWN"]) == (3, False)
        assert (second.arguments["BRANCHES"], second.arguments["KNOWN"]) == (2, True)
        # Values side by side that take two launches: the second reads them from a column on.
        first, second = product((0,), dim=64, value_dim=384), product((0,), dim=64, value_dim=384)
        whole, rest = launched(first)
        assert rest.arguments["value_0"][0] == whole.arguments["value_0"][0] + 320 * 2
        assert planned(second) == anew(second) != [whole, rest]
        odd = product(dim=40, offset=1)
        refused = launched(odd)  # no descriptor holds it: as if the kernel had not been asked for
        rows_256 = configs.Config(256, 64, 4, 3, gluon=True)
        configs.apply_config = lambda *arguments: rows_256
        (large,) = launched(product(dim=40))
        assert large.arguments["query_0"][3] == [1, 1, 128, 32]
        assert (large.arguments["GROUPS"], large.arguments["ROWS"]) == (2, 128)
    finally:
        configs.apply_config = rule
    assert "query_ptr" in refused[0].arguments and refused == launched(odd)


def check_other_ways_to_compile() -> None:
    call = product()
    (plain,) = launched(call)
    triton.knobs.runtime.debug = True
    try:
        (checked,) = launched(call)
        assert checked.function != plain.function
    finally:
        triton.knobs.runtime.debug = False
    assert planned(call) == [plain]


def check_hooks() -> None:
    call, seen = product(), []
    launched(call)
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    planned(call)
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["apply_kernel"]
    apply_kernel.add_pre_run_hook(lambda *arguments, **named: seen.append(named["HEAD"][0]))
    launched(call)
    apply_kernel.pre_run_hooks.clear()
    assert seen == ["apply_kernel", 16]


def check_ready_calls() -> None:
    """Of `shared_attention`: the launches of a call that goes through checks and dispatcher, without either."""
    backend.unsupported_reasons = lambda *arguments: []
    index = (0, 1, 2, 2)
    query, key, value = heads_split(3, TOKENS, 40), heads_split(3, TOKENS, 40), heads_split(4, TOKENS, 40)
    arguments = query, key, value, index, 0.3, "triton"

    def call(maps: Sequence[int] = index) -> Tensor:
        return shared_attention(query, key, value, maps, scale=0.3, backend="triton")

    plans.forget()
    assert ready.call(*arguments) is None
    first = anew(call)
    check, validation.check_query_key = validation.check_query_key, refuse
    try:
        RecordingDriver.taken()
        out = call(list(index))
    finally:
        validation.check_query_key = check
    again = RecordingDriver.taken()
    assert (out.shape, out.stride(), out.dtype) == (value.shape, value.stride(), value.dtype)
    assert {launch.arguments["out_ptr"] for launch in again} == {out.data_ptr()}
    written = ("out_ptr", "logsumexp_ptr")
    for launch in (*first, *again):
        launch.arguments |= dict.fromkeys(written)
    assert again == first
    refuse_what_needs_the_dispatcher(arguments)
    configs.one_launch, rule = (lambda *tensors: False), configs.one_launch
    try:
        assert ready.call(*arguments) is None
    finally:
        configs.one_launch = rule
    assert ready.call(*arguments) is not None
    plans.forget()
    assert ready.call(*arguments) is None


def refuse_what_needs_the_dispatcher(arguments: tuple) -> None:
    query, key, value, index, scale, name = arguments
    graph = torch.empty_like(query).requires_grad_()
    negative = torch._neg_view(query)
    others = {
        "a graph": (graph, key, value, index, scale, name),
        "a view whose sign is still to be turned": (negative, key, value, index, scale, name),
        "a parameter": (torch.nn.Parameter(query, requires_grad=False), key, value, index, scale, name),
        "numbers that equal an index": (query, key, value, (False, True, 2, 2), scale, name),
        "an index that cannot be hashed": (query, key, value, ([0], 1, 2, 2), scale, name),
        "another scale": (query, key, value, index, None, name),
        "another layout": (query, key, value.contiguous(), index, scale, name),
        "another alignment": (query, heads_split(3, TOKENS, 40, offset=1), value, index, scale, name),
    }
    assert ready.call(*arguments) is not None
    for what, given in others.items():
        assert ready.call(*given) is None, what
    with torch.no_grad():
        shared_attention(graph, key, value, index, scale=scale, backend=name)
        assert ready.call(*others["a graph"]) is not None
    assert ready.call(*others["a graph"]) is None
    modes = (
        torch.device("cpu"),
        FlopCounterMode(display=False),
        torch.autograd.profiler.profile(),
        forward_ad.dual_level(),
    )
    for mode in modes:
        with mode:
            assert ready.call(*arguments) is None, mode


if __name__ == "__main__":
    RecordingDriver.install()
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(name)
