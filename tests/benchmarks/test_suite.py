"""The suite itself: a wrong result gets no time, a slowdown is noticed, a missing rival is named."""

import time

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measure
from benchmarks.cases import LAYOUTS, OPS, Case
from benchmarks.compare import regressions
from benchmarks.cost import Ceilings
from benchmarks.inputs import Inputs, judge
from benchmarks.measure import Effort, busy_ms, interleaved
from benchmarks.plan import Step, kernel_plan
from benchmarks.providers import DenseOriginal, Missing, Ours, first_answer, groups
from benchmarks.report import case_table, summary
from benchmarks.rivals import Fused, all_providers
from benchmarks.rows import Environment
from benchmarks.run import Bench, run_kernels

SMALL = Case("test", 64, 64, 2, 8, 1, "pair")
BRIEF = Effort(rounds=3, least_rounds=3, seconds=1.0, sample_ms=1.0, calls_a_sample=3)
HERE = Environment("cpu: a processor (2 cores)", 1, {"torch": "2.13.0"}, "0123456789ab", "2026-01-01")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setitem(measure.CACHE_BYTES, "cpu", 2**16)  # nothing here depends on a cold cache
    return Bench("cpu", torch.float32, BRIEF, HERE)


class Slow(Ours):
    """Ours, with a nap of two hundredths of a second."""

    def prepare(self, inputs):
        call = super().prepare(inputs)

        def napping():
            time.sleep(0.02)
            return call()

        return napping


class Wrong(Ours):
    """Ours, with one element of one row off by a thousandth."""

    def prepare(self, inputs):
        call = super().prepare(inputs)

        def spoiled():
            answer = [out.clone() for out in call()]
            answer[1][0, 3, 2] += 1e-3
            return answer

        return spoiled


class Unwritten(Ours):
    """Ours, with a last row that nobody wrote."""

    def prepare(self, inputs):
        call = super().prepare(inputs)

        def spoiled():
            answer = [out.clone() for out in call()]
            answer[0][-1, -1] = float("nan")
            return answer

        return spoiled


class Breaks:
    name = "breaks"

    def prepare(self, inputs):
        raise RuntimeError("out of luck\nand more")


def providers(*ours):
    return [*ours, *(p for name, p in all_providers().items() if name in ("sdpa", "unedited"))]


@pytest.mark.slow
def test_a_planted_slowdown_is_caught(bench):
    before = bench.case(SMALL, providers(Ours("torch")))
    after = bench.case(SMALL, providers(Slow("torch")))
    found = regressions(before, after)
    assert len(found) == 1 and "fpe-torch" in found[0] and "the time of sdpa" in found[0]
    assert regressions(before, before) == []


@pytest.mark.parametrize("spoiled", [pytest.param(Wrong, marks=pytest.mark.slow), Unwritten])
def test_a_planted_wrong_result_gets_no_time_and_is_caught(bench, spoiled):
    before = bench.case(SMALL, providers(Ours("torch")))
    after = bench.case(SMALL, providers(spoiled("torch")))
    row = next(row for row in after if row.provider == "fpe-torch")
    assert row.status == "wrong" and row.samples_ms == () and row.reason
    assert "is now wrong" in regressions(before, after)[0]
    assert "wrong" in case_table(after)
    assert row.reason in summary(after)


@pytest.mark.slow
def test_more_memory_is_caught(bench):
    import dataclasses

    before = bench.case(SMALL, providers(Ours("torch")))
    after = [dataclasses.replace(row, peak_mb=(row.peak_mb or 0) + 1) for row in before]
    assert "where it held" in regressions(before, after)[0]


def test_a_provider_that_raises_becomes_a_row(bench):
    (row,) = bench.case(SMALL, [Breaks()])
    assert (row.status, row.reason) == ("failed", "RuntimeError: out of luck")


def test_rivals_that_are_missing_are_listed_once_with_the_reason(bench):
    names = ["fpe-triton", "flash-attn-2", "flash-attn-3", "xformers", "sageattention"]
    chosen = {name: all_providers()[name] for name in names}
    rows = run_kernels(bench, chosen, [Step(SMALL, "all"), Step(Case("test", 64, 32, 2, 8), "all")])
    assert [row.provider for row in rows] == names
    assert all(row.status == "missing" and row.case == "any" and row.reason for row in rows)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_every_provider_answers_every_operation_alike(layout, op):
    """All providers that serve a case on a CPU pass the gate; the compiled ones are left to longer runs."""
    case = Case("test", 48, 36, 2, 24, 2, layout, op)
    inputs = Inputs.make(case, "cpu", torch.float32)
    served = []
    for name, provider in all_providers().items():
        if name.startswith("flex"):
            continue
        try:
            _, answer = first_answer(provider, inputs)
        except Missing as reason:
            assert str(reason)
            continue
        verdict = judge(inputs, answer)
        assert verdict.passed, f"{name}: {verdict.reason}"
        served.append(name)
    assert {"dense-original", "sdpa", "sdpa-math"} <= set(served)
    if layout == "pair" or op in ("apply", "backward"):
        assert "fpe-torch" in served


def test_the_judge_knows_the_shape_of_an_answer():
    inputs = Inputs.make(SMALL, "cpu", torch.float32)
    answer = first_answer(DenseOriginal(), inputs)[1]
    assert judge(inputs, answer).passed
    assert "3 outputs" in judge(inputs, [*answer, answer[0]]).reason
    assert "expected" in judge(inputs, [out[..., :4] for out in answer]).reason


def test_long_cases_are_checked_on_a_draw_of_rows_with_both_ends():
    inputs = Inputs.make(Case("test", 800, 10_000, 1, 8), "cpu", torch.float32)
    assert len(inputs.rows) == len(set(inputs.rows.tolist())) == 256
    assert {0, 9_999} <= set(inputs.rows.tolist())


def test_rounds_are_shared_and_their_order_rotates():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = interleaved(calls, "cpu", Effort(rounds=3, least_rounds=3, calls_a_sample=1))
    assert {len(values) for values in samples.values()} == {3}
    assert "".join(order[-9:]) == "abcbcacab"


def test_a_device_is_kept_busy_for_as_long_as_queueing_takes():
    assert [busy_ms(queueing) for queueing in (0.05, 0.4, 1.2, 50.0)] == [0.5, 0.8, 2.4, 3.0]


def test_a_gathered_batch_is_one_call_with_the_same_answer():
    inputs = Inputs.make(Case("test", 64, 16, 2, 8, 1, "halves"), "cpu", torch.float32)
    sizes = []

    def attend(query, key, value):
        sizes.append(query.shape[0])
        return F.scaled_dot_product_attention(query, key, value)

    answer = Fused("gathered", lambda inputs: attend, gathered=True).prepare(inputs)()
    assert set(sizes) == {4} and judge(inputs, answer).passed
    pair = Inputs.make(Case("test", 64, 16, 2, 8, 1, "pair"), "cpu", torch.float32)
    with pytest.raises(Missing, match="one call serves all rows"):
        Fused("gathered", lambda inputs: attend, gathered=True).prepare(pair)


@pytest.mark.parametrize(("widest", "widths"), [(64, [40]), (24, [24, 16])])
def test_captured_columns_stand_beside_values_where_they_are_taken_so_wide(widest, widths):
    inputs = Inputs.make(Case("test", 64, 16, 2, 8, 2, "pair", "capture"), "cpu", torch.float32)
    called = []

    def attend(query, key, value):
        if value.shape[-1] > widest:
            raise ValueError("too wide")
        called.append(value.shape[-1])
        return F.scaled_dot_product_attention(query, key, value)

    call = Fused("concat", lambda inputs: attend, concat=True).prepare(inputs)
    called.clear()
    assert judge(inputs, call()).passed
    assert called == widths


def test_groups_need_no_gather():
    def as_ranges(index):
        return [(g.maps.start, g.maps.stop, g.rows.start, g.rows.stop) for g in groups(index)]

    assert as_ranges([0, 0]) == [(0, 1, 0, 2)]
    assert as_ranges([0, 1, 2, 2]) == [(0, 2, 0, 2), (2, 3, 2, 4)]
    assert as_ranges([0, 0, 1, 1]) == [(0, 1, 0, 2), (1, 2, 2, 4)]
    assert as_ranges([2, 0, 1]) == [(2, 3, 0, 1), (0, 2, 1, 3)]


def test_the_longest_of_the_three_ceilings_is_the_limit():
    case = Case("m", 512, 4096, 8, 64)
    assert Ceilings(1e12, 1e30, 1e30).limit_ms(case, 4) == pytest.approx(case.flops / 1e9)
    assert Ceilings(1e30, 1e30, 1e9).limit_ms(case, 4) == pytest.approx(case.exponentials / 1e6)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plans_start_with_the_headline_and_hold_no_case_twice(device):
    steps = kernel_plan(device)
    if device == "cuda":  # where rivals that compile first are met last, in the headline's cases once more
        last = steps[-2:]
        assert [step.who for step in last] == ["all", "all"]
        assert steps[0].who == "uncompiled" and steps[0].case == last[0].case
        steps = steps[:-2]
    else:
        assert steps[0].who == "all"
    names = [step.case.name for step in steps]
    assert len(names) == len(set(names))
    assert names[0] == "sd15-512/4096x8x40/pair-1/apply"
    assert {"sd15", "sd21", "sdxl"} <= {step.case.model for step in steps}
