"""How a backend is run for the contract, and the part of the contract that concerns products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fpe_kernels import AttentionMap, shared_attention
from fpe_kernels.backends import blocks, fused_cpu
from fpe_kernels.testing import (
    LAYOUTS,
    Case,
    assert_matches,
    assert_within_budget,
    causal_bias,
    make,
    make_case,
    padding_bias,
    score_magnitude,
)
from fpe_kernels.validation import accumulator_dtype

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INF = float("inf")


def cut_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the torch backend take many blocks for small shapes, and no fused call."""
    for name, number in {
        "THREAD_BLOCK_BYTES": 256,
        "ADDED_BLOCK_BYTES": 256,
        "WHOLE_KEYS": 13,
        "KEY_BLOCK": 13,
        "MIN_QUERY_BLOCK": 4,
    }.items():
        monkeypatch.setattr(blocks, name, number)
    monkeypatch.setattr(fused_cpu, "_serves", lambda *operands: False)


costly = pytest.mark.costly
#: One of each kind: heads in the middle, a slice of more, neighbours far apart, an address that is not aligned.
FEW_LAYOUTS = ("heads_split", "fused_chunk", "channels_first", "misaligned")
"""Marks parameters that the interpreter would take many seconds for; a device runs them all."""


def operands(case: Case) -> tuple:
    """The leading operands of every op."""
    return case.query, case.key, case.value, case.bias


def forward(case: Case, backend: str) -> dict[str, Tensor]:
    """Products of ``case`` through the ops: direct, from the known log-sum-exp, and the adjoint."""
    query, key, value, bias = operands(case)
    rest = (list(case.map_index), case.factor, backend)
    settings = (case.row_weight, case.key_lengths)
    out, logsumexp = torch.ops.fpe_kernels.apply(query, key, value, bias, *rest, None, case.key_lengths)
    if case.row_weight is not None:
        # Statistics of rows without a weight are not computed, so they come from the unweighted product.
        out, _ = torch.ops.fpe_kernels.apply(query, key, value, bias, *rest, *settings)
    replayed = torch.ops.fpe_kernels.replay(query, key, value, bias, logsumexp, *rest, *settings)
    adjoint = torch.ops.fpe_kernels.adjoint(query, key, case.weight, bias, logsumexp, *rest, case.key_lengths)
    assert_matches(case, out=replayed)
    return {"out": out, "logsumexp": logsumexp, "adjoint": adjoint}


def forward_out(case: Case, backend: str) -> Tensor:
    """The product alone."""
    rest = (list(case.map_index), case.factor, backend)
    return torch.ops.fpe_kernels.apply(*operands(case), *rest, case.row_weight, case.key_lengths)[0]


class ProductContract:
    """What every backend owes for ``A @ v``, ``A.T @ w`` and the log-sum-exp."""

    backend: str
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def case(self, seed: int = 0, **options) -> Case:
        return make_case(seed, **{"device": self.device, "dtype": self.dtypes[0], "heads": 1, **options})

    def check(self, seed: int = 0, **options) -> None:
        case = self.case(seed, **options)
        assert_matches(case, **forward(case, self.backend))

    def attention_map(self, case: Case, **options) -> AttentionMap:
        return AttentionMap(
            case.query,
            case.key,
            scale=case.scale,
            bias=case.bias,
            key_lengths=case.key_lengths,
            **{"backend": self.backend, **options},
        )

    @pytest.mark.parametrize(
        ("queries", "keys"),
        [(1, 1), (1, 7), (7, 1), (63, 65), (65, 64), (64, 128)]
        + [pytest.param(*size, marks=costly) for size in [(255, 77), (256, 1023), (1023, 255), (1, 1025)]],
    )
    def test_ragged_sizes(self, queries: int, keys: int) -> None:
        self.check(queries=queries, keys=keys, heads=2)

    @pytest.mark.parametrize("head_dim", [1, 8, 16, 40, 64, 72, 80, 88, 96, 112, 120, 128, 160, 256])
    def test_head_dims(self, head_dim: int) -> None:
        self.check(head_dim=head_dim, queries=9, keys=17)

    @pytest.mark.parametrize("value_dim", [1, 3, 24, 200, 320, 336, pytest.param(1000, marks=costly)])
    def test_value_dim_differs_and_exceeds_a_launch(self, value_dim: int) -> None:
        self.check(value_dim=value_dim, queries=9, keys=17, head_dim=8)

    @pytest.mark.parametrize(
        ("maps", "map_index"),
        [
            (1, (0, 0)),
            (2, (1, 0, 1)),
            (4, (0, 1, 2, 3, 3, 3)),  # an unconditional half of its own beside a shared one
            (3, (2, 2)),  # maps that no row names
            (1, (0,) * 9),  # more branches than one launch holds
            (2, (0, 1) + (1,) * 9),
            pytest.param(1, (0,) * 33, marks=costly),
        ],
    )
    def test_shared_maps(self, maps: int, map_index: tuple[int, ...]) -> None:
        self.check(maps=maps, map_index=map_index, queries=9, keys=17, head_dim=40)

    @pytest.mark.parametrize(
        "layout", [pytest.param(name, marks=[] if name in FEW_LAYOUTS else costly) for name in LAYOUTS]
    )
    def test_layouts(self, layout: str) -> None:
        self.check(layout=layout, maps=2, map_index=(1, 0), heads=2, queries=17, keys=9, head_dim=24)

    def test_dtypes(self) -> None:
        for dtype in self.dtypes:
            self.check(dtype=dtype, queries=65, keys=70, head_dim=40, layout="fused_chunk", maps=1, map_index=(0, 0))

    @pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
    @pytest.mark.parametrize("bias", [None, (0, 0, 1, 1)])
    def test_scales(self, scale: float, bias: tuple[int, ...] | None) -> None:
        self.check(scale=scale, bias=bias, queries=9, keys=65)

    def test_odd_layouts_of_each_operand(self) -> None:
        self.check(
            layout=("entries_sliced", "heads_expanded", "channels_first", "misaligned"), heads=2, maps=2, head_dim=40
        )

    @pytest.mark.parametrize("axes", [pytest.param(n, marks=[] if n in (0, 6, 9, 15) else costly) for n in range(16)])
    def test_bias_broadcasts_every_way(self, axes: int) -> None:
        varies = [bool(axes >> axis & 1) for axis in range(4)]
        self.check(bias=varies, masked=0.2, maps=2, map_index=(1, 0, 1), heads=2, queries=9, keys=66)

    def test_bias_keeps_its_strides(self) -> None:
        case = self.case(queries=9, keys=17)
        bias = make((1, 1, 9, 34), 5, self.dtypes[0], self.device)[..., ::2]
        case = replace(case, bias=bias)
        assert_matches(case, **forward(case, self.backend))
        case = replace(case, bias=make((1, 1, 17, 9), 5, self.dtypes[0], self.device).transpose(2, 3))
        assert_matches(case, **forward(case, self.backend))

    @pytest.mark.parametrize("keys", [40, 64, 130])
    def test_rows_masked_throughout_are_zero(self, keys: int) -> None:
        case = self.case(queries=70, keys=keys, bias=(0, 0, 1, 1))
        case.bias[:, :, [0, 5, 69]] = -INF
        case.bias[:, :, 7, : keys - 1] = -INF  # a row that sees the last key alone
        results = forward(case, self.backend)
        assert_matches(case, **results)
        assert (results["out"][:, :, [0, 5, 69]] == 0).all()
        assert results["logsumexp"][:, :, [0, 5, 69]].isneginf().all()
        assert torch.equal(results["out"][:, :, 7], case.value[:, :, -1].to(results["out"].dtype))

    def test_a_map_masked_throughout_is_zero(self) -> None:
        case = self.case(queries=5, keys=70, maps=2, map_index=(0, 1))
        case = replace(case, bias=padding_bias([0, 70], 70, case.query.dtype, self.device))
        results = forward(case, self.backend)
        assert_matches(case, **results)
        assert (results["out"][0] == 0).all()
        assert (results["adjoint"][0] == 0).all()

    def test_key_padding_equals_shorter_keys(self) -> None:
        case = self.case(queries=9, keys=80)
        padded = replace(case, bias=padding_bias([66], 80, case.query.dtype, self.device))
        cut = replace(case, key=case.key[:, :, :66], value=case.value[:, :, :66])
        case.value[:, :, 66:] = 1e4
        assert_matches(cut, out=forward(padded, self.backend)["out"])

    def test_a_finite_mask_works_beside_unmasked_entries(self) -> None:
        case = self.case(queries=9, keys=17, bias=(0, 0, 1, 1))
        case.bias[:, :, 1:, 5:] = torch.finfo(case.bias.dtype).min
        infinite = replace(case, bias=case.bias.masked_fill(case.bias < -1e4, -INF))
        assert_matches(infinite, out=forward(case, self.backend)["out"])

    def test_causal_mask(self) -> None:
        case = self.case(queries=70, keys=70)
        case = replace(case, bias=causal_bias(70, 70, case.query.dtype, self.device)[None, None])
        assert_matches(case, **forward(case, self.backend))

    def test_shift_invariance_of_the_bias(self) -> None:
        case = self.case(queries=9, keys=17, bias=(0, 0, 1, 1))
        shifted = replace(case, bias=case.bias + torch.tensor(3.0).to(case.bias))
        results = forward(shifted, self.backend)
        assert_matches(case, out=results["out"])
        assert_matches(shifted, **results)

    @pytest.mark.parametrize(
        "varies",
        [(0, 0, 1), (1, 0, 0), (1, 1, 1)] + [pytest.param(v, marks=costly) for v in [(0, 0, 0), (0, 1, 1), (1, 0, 1)]],
    )
    @pytest.mark.parametrize("head_dim", [8, 40])
    def test_row_weights_broadcast_every_way(self, varies: tuple[int, ...], head_dim: int) -> None:
        self.check(row_weight=varies, maps=2, map_index=(1, 0, 1), heads=2, queries=9, keys=17, head_dim=head_dim)

    def test_row_weights_of_more_branches_than_a_launch(self) -> None:
        case = self.case(map_index=(0,) * 9, queries=9, keys=17, head_dim=40, row_weight=(1, 0, 1))
        case.row_weight[:5] = 0.0  # the first launch has no weight, but the later ones need its statistics
        assert_matches(case, **forward(case, self.backend))

    def test_a_wide_value_with_row_weights(self) -> None:
        self.check(value_dim=336, queries=9, keys=17, head_dim=8, row_weight=(1, 1, 1))

    def test_row_weights_beside_bias_and_dtypes(self) -> None:
        for dtype in self.dtypes:
            self.check(dtype=dtype, queries=17, keys=70, bias=(0, 0, 1, 1), masked=0.4, row_weight=(0, 0, 1))

    def test_rows_without_a_weight_are_zero_wherever_they_lie(self) -> None:
        case = self.case(queries=300, keys=9, map_index=(0, 0), head_dim=8, row_weight=(1, 0, 1))
        case.row_weight[:, :, :140] = 0.0
        case.row_weight[1] = 0.0
        case.value[1] = make(case.value[1:].shape, 8, case.value.dtype, self.device, amplitude=1e3)[0]
        results = forward(case, self.backend)
        assert_matches(case, **results)
        assert (results["out"][:, :, :140] == 0).all()
        assert (results["out"][1] == 0).all()

    def test_a_weight_that_is_nan_shows(self) -> None:
        case = self.case(queries=9, keys=7, row_weight=(0, 0, 1), unweighted=1.0)
        case.row_weight[..., 4] = float("nan")
        assert forward_out(case, self.backend)[:, :, 4].isnan().all()

    @pytest.mark.parametrize("options", [{}, {"bias": (0, 0, 1, 1), "masked": 0.3}, {"row_weight": (1, 0, 1)}], ids=str)
    @pytest.mark.parametrize("lengths", [(70, 66, 1), (64, 0, 13)])
    def test_key_lengths(self, lengths: tuple[int, ...], options: dict) -> None:
        self.check(maps=3, map_index=(1, 0, 2, 0), key_lengths=lengths, queries=9, keys=70, heads=2, **options)

    def test_keys_past_the_length_do_not_exist(self) -> None:
        case = self.case(queries=9, keys=80, key_lengths=(66,), head_dim=8)
        cut = replace(case, key=case.key[:, :, :66], value=case.value[:, :, :66], key_lengths=None)
        case.value[:, :, 66:] = float("nan")
        case.key[:, :, 66:] = float("nan")
        assert_matches(cut, out=forward_out(case, self.backend))
        adjoint = self.attention_map(case).T @ case.weight
        assert (adjoint[:, :, 66:] == 0).all()
        assert_matches(cut, adjoint=adjoint[:, :, :66])

    def test_a_map_of_length_zero_is_zero(self) -> None:
        results = forward(self.case(queries=9, keys=7, key_lengths=(0,), map_index=(0, 0)), self.backend)
        assert (results["out"] == 0).all()
        assert (results["adjoint"] == 0).all()
        assert results["logsumexp"].isneginf().all()

    @pytest.mark.parametrize(
        "options",
        [
            {"key_heads": 2, "value_heads": 2},
            {"key_heads": 1, "value_heads": 1, "map_index": (0, 0), "layout": "heads_split"},
            {"key_heads": 2, "key_lengths": (5,)},  # values with heads of their own
            {"value_heads": 1, "bias": (0, 1, 1, 1), "row_weight": (1, 1, 1)},
            {"key_heads": 2, "value_heads": 2, "maps": 2, "map_index": (1, 0, 1), "key_lengths": (5, 17)},
        ],
        ids=str,
    )
    def test_grouped_heads(self, options: dict) -> None:
        self.check(heads=4, queries=9, keys=17, **options)

    @pytest.mark.parametrize("known", [False, True])
    def test_wide_products_are_those_of_the_statistics_dtype(self, known: bool) -> None:
        for dtype in self.dtypes:
            case = self.case(dtype=dtype, queries=33, keys=40, head_dim=24, map_index=(0, 0))
            rest = (list(case.map_index), case.factor, self.backend)
            out, logsumexp = torch.ops.fpe_kernels.apply(*operands(case), *rest, wide=True)
            if known:
                out = torch.ops.fpe_kernels.replay(*operands(case), logsumexp, *rest, wide=True)
            adjoint = torch.ops.fpe_kernels.adjoint(
                *operands(case)[:2], case.weight, case.bias, logsumexp, *rest, wide=True
            )
            assert {out.dtype, adjoint.dtype} == {accumulator_dtype(dtype)}
            assert_matches(case, out=out, adjoint=adjoint)
            if self.backend != "reference":  # which computes in half precision where that is asked for
                narrow, _ = torch.ops.fpe_kernels.apply(*operands(case), *rest)
                assert known or torch.equal(out.to(dtype), narrow)

    def test_large_logits_do_not_overflow(self) -> None:
        for dtype in self.dtypes:
            if dtype == torch.float16 and self.backend == "reference":
                continue  # plain PyTorch overflows float16 here; that is what the fused backends avoid
            case = self.case(dtype=dtype, queries=9, keys=130, amplitude=150.0, scale=1.0)
            results = forward(case, self.backend)
            assert score_magnitude(case) > 1e5
            assert all(result.isfinite().all() for result in results.values())
            assert_matches(case, **results)

    @pytest.mark.parametrize("offset", [-300.0, 300.0])
    def test_scores_far_from_zero(self, offset: float) -> None:
        case = self.case(queries=9, keys=70, bias=(0, 0, 1, 1))
        case = replace(case, bias=case.bias + offset)
        assert_matches(case, **forward(case, self.backend))

    def test_a_single_key_is_the_value_itself(self) -> None:
        case = self.case(queries=9, keys=1)
        out = forward(case, self.backend)["out"]
        assert torch.equal(out, case.value.expand_as(out))

    def test_an_empty_value_gives_an_empty_product(self) -> None:
        case = self.case(queries=9, keys=7)
        empty = replace(case, value=case.value[..., :0], weight=case.weight[..., :0])
        results = forward(empty, self.backend)
        assert results["out"].shape == (1, 1, 9, 0)
        assert results["adjoint"].shape == (1, 1, 7, 0)
        assert_matches(case, logsumexp=results["logsumexp"])

    def test_the_same_inputs_give_the_same_bits(self) -> None:
        case = self.case(queries=70, keys=70, maps=2, map_index=(0, 1, 1), bias=(0, 1, 1, 1), masked=0.2)
        first, second = forward(case, self.backend), forward(case, self.backend)
        for name, result in first.items():
            assert torch.equal(result, second[name]), name

    def test_rows_sum_to_one(self) -> None:
        case = self.case(queries=70, keys=77, heads=2)
        product = self.attention_map(case) @ torch.ones_like(case.value)
        exact = torch.ones(product.shape, dtype=torch.float64, device=self.device)
        assert_within_budget(product, exact, exact, case.query.dtype, scores=score_magnitude(case))

    def test_linearity(self) -> None:
        case = self.case(queries=9, keys=17)
        other = replace(case, value=make(case.value.shape, 9, case.value.dtype, self.device))
        combined = replace(case, value=2.0 * case.value - 3.0 * other.value)
        operator = self.attention_map(case)
        assert_matches(combined, out=2.0 * (operator @ case.value) - 3.0 * (operator @ other.value))

    def test_adjoint_identity(self) -> None:
        case = self.case(queries=33, keys=70, bias=(0, 1, 1, 1), masked=0.3)
        operator = self.attention_map(case)
        left = ((operator @ case.value).double() * case.weight.double()).sum()
        right = (case.value.double() * (operator.T @ case.weight).double()).sum()
        exact = (case.exact["out"] * case.weight.double()).sum()
        magnitude = case.magnitude["out"] * float(case.weight.double().abs().sum())
        for side in (left, right):
            assert_within_budget(side, exact, exact, case.query.dtype, magnitude, score_magnitude(case))

    def test_a_tuple_is_the_separate_products(self) -> None:
        case = self.case(queries=9, keys=17, maps=2)
        narrow = make((2, 1, 17, 5), 9, case.value.dtype, self.device)
        other = replace(case, value=narrow, weight=case.weight[..., :5])
        both = self.attention_map(case) @ (case.value, other.value)
        assert isinstance(both, tuple)
        assert_matches(case, out=both[0])
        assert_matches(other, out=both[1])

    def test_values_of_a_tuple_may_have_the_heads_of_the_keys_or_of_the_map(self) -> None:
        shared = self.case(heads=4, key_heads=2, value_heads=2, queries=9, keys=17)
        own = replace(shared, value=make((1, 4, 17, 5), 9, shared.value.dtype, self.device))
        own = replace(own, weight=shared.weight[..., :5])
        both = self.attention_map(shared) @ (shared.value, own.value)
        assert_matches(shared, out=both[0])
        assert_matches(own, out=both[1])

    def test_column_sums_are_the_adjoint_of_ones(self) -> None:
        case = self.case(queries=33, keys=17)
        ones = replace(case, weight=torch.ones_like(case.weight[..., :1]), value=case.value[..., :1])
        assert_matches(ones, adjoint=self.attention_map(case).column_sums().unsqueeze(-1))

    def test_shared_attention_is_the_gathered_product(self) -> None:
        case = self.case(maps=2, map_index=(1, 0, 1), queries=9, keys=17, heads=2, bias=(1, 0, 0, 1), masked=0.3)
        out = shared_attention(
            case.query, case.key, case.value, case.map_index, scale=case.scale, bias=case.bias, backend=self.backend
        )
        assert_matches(case, out=out)
        assert out.transpose(1, 2).is_contiguous()  # so that merging the heads is a view
