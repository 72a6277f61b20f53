"""Laws of the operator on shapes and numbers that hypothesis chooses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fpe_kernels import AttentionMap, shared_attention
from fpe_kernels.testing import LAYOUTS, Case, assert_matches, assert_within_budget, make, make_case, score_magnitude

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.sampled_from(["reference", "torch"])


@st.composite
def cases(draw: st.DrawFn, **fixed) -> Case:
    size = st.integers(1, 20)
    options = {
        "maps": draw(st.integers(1, 3)),
        "heads": draw(st.integers(1, 3)),
        "queries": draw(size),
        "keys": draw(size),
        "head_dim": draw(size),
        "value_dim": draw(size),
        "layout": draw(st.tuples(*[st.sampled_from(list(LAYOUTS))] * 4)),
        "bias": draw(st.none() | st.tuples(*[st.booleans()] * 4)),
        "masked": draw(st.sampled_from([0.0, 0.3])),
        "scale": draw(st.none() | st.floats(-2.0, 2.0)),
    }
    return make_case(draw(st.integers(0, 2**16)), **{**options, **fixed})


def operator_of(case: Case, name: str) -> AttentionMap:
    return AttentionMap(case.query, case.key, scale=case.scale, bias=case.bias, backend=name)


@few
@given(cases(), names)
def test_products_and_statistics(case: Case, name: str) -> None:
    operator = operator_of(case, name)
    assert_matches(case, out=operator @ case.value, adjoint=operator.T @ case.weight, logsumexp=operator.logsumexp)


@few
@given(cases(masked=0.0), names)
def test_rows_sum_to_one_and_entries_are_shares(case: Case, name: str) -> None:
    operator = operator_of(case, name)
    sums = operator @ torch.ones_like(case.value)
    one = torch.ones(sums.shape, dtype=torch.float64)
    assert_within_budget(sums, one, one, torch.float32, scores=score_magnitude(case))
    assert (operator.dense() >= 0).all()


@few
@given(cases(), names)
def test_the_adjoint_is_the_adjoint(case: Case, name: str) -> None:
    operator = operator_of(case, name)
    left = ((operator @ case.value).double() * case.weight.double()).sum()
    right = (case.value.double() * (operator.T @ case.weight).double()).sum()
    magnitude = case.magnitude["out"] * float(case.weight.double().abs().sum())
    magnitude += case.magnitude["adjoint"] * float(case.value.double().abs().sum())
    assert_within_budget(left, left.double(), right, torch.float32, magnitude, score_magnitude(case))


@few
@given(cases(), names, st.integers(1, 5))
def test_a_tuple_is_the_separate_products(case: Case, name: str, columns: int) -> None:
    other = make((*case.value.shape[:3], columns), 99)
    first, second = operator_of(case, name) @ (case.value, other)
    assert_matches(case, out=first)
    assert_matches(replace(case, value=other, weight=make((*case.weight.shape[:3], columns), 98)), out=second)


@few
@given(cases(maps=3), names, st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_sharing_is_gathering(case: Case, name: str, index: list[int]) -> None:
    value = make((len(index), *case.value.shape[1:]), 99)
    weight = make((len(index), *case.weight.shape[1:]), 98)
    shared = replace(case, value=value, weight=weight, map_index=tuple(index))
    out = shared_attention(case.query, case.key, value, index, scale=case.scale, bias=case.bias, backend=name)
    assert_matches(shared, out=out)


@few
@given(cases(), names, st.randoms(use_true_random=False))
def test_keys_have_no_order(case: Case, name: str, random) -> None:
    order = list(range(case.key.shape[2]))
    random.shuffle(order)
    bias = case.bias if case.bias is None or case.bias.shape[3] == 1 else case.bias[..., order]
    shuffled = AttentionMap(case.query, case.key[:, :, order], scale=case.scale, bias=bias, backend=name)
    assert_matches(case, out=shuffled @ case.value[:, :, order])


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_threads_do_not_disturb_one_another(name: str) -> None:
    if name == "triton" and not torch.cuda.is_available():
        pytest.skip("the interpreter keeps its program ids in globals")
    device = "cuda" if name == "triton" else "cpu"
    many = [make_case(seed, maps=2, map_index=(1, 0, 1), queries=33, keys=40, device=device) for seed in range(8)]

    def run(case: Case) -> None:
        for _ in range(5):
            out = shared_attention(case.query, case.key, case.value, case.map_index, backend=name)
            assert_matches(case, out=out)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, many))
