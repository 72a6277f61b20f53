"""What every backend owes for joined maps and for ranges of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fpe_kernels import AttentionMap, LinearMap, beside, join, stack
from fpe_kernels.backends.reference import attention_map, repeated
from fpe_kernels.testing import Case, assert_matches, assert_within_budget, make, padding_bias, score_magnitude
from fpe_kernels.validation import accumulator_dtype
from tests.support.contract import ProductContract, costly, operands
from tests.support.contract_gradients import gradients

INF = float("inf")
CUTS = [(0, 5, 17), (0, 0, 17), (0, 1, 2, 16, 17), pytest.param((0, 4, 9, 9, 13, 17, 17), marks=costly)]


def cut(operator: AttentionMap, cuts: Sequence[int]) -> list[LinearMap]:
    """The softmaxes over ranges of the keys."""
    return [operator.keys(start, stop) for start, stop in pairwise(cuts)]


class JoinContract(ProductContract):
    """Joined maps: one softmax over all keys, whatever it is cut into."""

    def joined(self, case: Case, cuts: Sequence[int]) -> LinearMap:
        return join(cut(self.attention_map(case), cuts))

    def check_join(self, cuts: Sequence[int], **options) -> None:
        case = self.case(**{"queries": 9, "keys": 17, **options})
        joined = self.joined(case, cuts)
        assert joined.shape == (*case.query.shape[:3], case.key.shape[2])
        out = joined @ case.value
        assert out.transpose(1, 2).is_contiguous()  # so that merging the heads is a view
        assert_matches(case, out=out, adjoint=joined.T @ case.weight, logsumexp=joined.logsumexp)

    @pytest.mark.parametrize("cuts", CUTS)
    @pytest.mark.parametrize("bias", [None, (0, 1, 1, 1)])
    def test_parts_joined_are_the_map_over_all_keys(self, cuts: tuple[int, ...], bias) -> None:
        self.check_join(cuts, maps=2, heads=2, bias=bias, masked=0.6)

    def test_joined_maps_in_every_dtype(self) -> None:
        for dtype in self.dtypes:
            self.check_join((0, 3, 66, 70), dtype=dtype, queries=33, keys=70, head_dim=40, layout="fused_chunk")

    @pytest.mark.parametrize(
        "options",
        [
            {"heads": 4, "key_heads": 2, "value_heads": 2},
            {"heads": 4, "key_heads": 1, "key_lengths": (9,)},
            {"maps": 2, "key_lengths": (3, 12), "bias": (0, 0, 0, 1)},
            {"maps": 2, "key_lengths": (0, 17)},
            {"scale": -0.4, "amplitude": 3.0},
        ],
        ids=str,
    )
    def test_joined_maps_of_grouped_heads_and_key_lengths(self, options: dict) -> None:
        self.check_join((0, 5, 11, 17), **options)

    @pytest.mark.parametrize(
        "head_dim",
        [88, pytest.param(96, marks=costly), 112, pytest.param(128, marks=costly), pytest.param(256, marks=costly)],
    )
    def test_joined_maps_of_wide_heads(self, head_dim: int) -> None:
        self.check_join((0, 5, 17), head_dim=head_dim)

    def test_scores_far_from_zero_and_from_one_another(self) -> None:
        case = self.case(queries=9, keys=17, bias=(0, 0, 0, 1))
        case.bias[..., :5] -= 300.0
        case.bias[..., 11:] += 300.0
        joined = self.joined(case, (0, 5, 11, 17))
        assert_matches(case, out=joined @ case.value, adjoint=joined.T @ case.weight, logsumexp=joined.logsumexp)

    def test_a_shared_part_beside_private_ones(self) -> None:
        """Image keys of one map for all rows, text keys of each row's own, and queries of the shared one's."""
        case = self.case(maps=3, heads=2, queries=9, keys=17, head_dim=24)
        query, shared = case.query[:1].expand(3, -1, -1, -1), case.key[:1, :, 7:]
        private = case.key[:, :, :7]
        image = AttentionMap(case.query[:1], shared, backend=self.backend).take([0, 0, 0])
        joined = join([AttentionMap(query, private, backend=self.backend), image])
        whole = torch.cat([private, shared.expand(3, -1, -1, -1)], dim=2)
        equal = replace(case, query=query, key=whole)
        assert_matches(equal, out=joined @ case.value, adjoint=joined.T @ case.weight, logsumexp=joined.logsumexp)

    def test_parts_of_other_queries_and_scales(self) -> None:
        first = self.case(0, queries=9, keys=5, heads=2, scale=0.7)
        second = self.case(7, queries=9, keys=12, heads=2, bias=(0, 0, 1, 1), masked=0.3)

        def dense(dtype: torch.dtype) -> Tensor:
            scores = []
            for case in (first.to(dtype), second.to(dtype)):
                own = case.factor * (case.query @ case.key.transpose(-1, -2))
                scores.append(own if case.bias is None else own + case.bias)
            return torch.cat(scores, dim=-1).softmax(-1)

        value = torch.cat([first.value, second.value], dim=2)
        joined = join([self.attention_map(first), self.attention_map(second)])
        exact, plain = dense(torch.float64) @ value.double(), dense(first.query.dtype) @ value
        magnitude = float((dense(torch.float64) @ value.double().abs()).max())
        scores = score_magnitude(first) + score_magnitude(second)
        assert_within_budget(joined @ value, plain, exact, first.query.dtype, magnitude, scores)

    @pytest.mark.parametrize(
        "options",
        [
            {"map_index": (0, 0, 1)},  # two rows that share a private part, beside different others
            {"map_index": (0,) * 9 + (1,), "head_dim": 40},  # more columns than a launch
            {"map_index": (1, 0), "row_weight": (1, 0, 1)},
            {"map_index": (1, 0), "key_lengths": (0, 4), "bias": (0, 0, 1, 1), "masked": 0.4},
            {"map_index": (1, 0, 1), "heads": 4, "key_heads": 2, "value_heads": 2, "value_dim": 24},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("known", [False, True])
    def test_a_last_part_takes_up_the_product_of_others(self, known: bool, options: dict) -> None:
        """``merge`` of each row's own product over other keys, the map over all of which is dense here."""
        case = self.case(maps=2, queries=9, keys=7, **{"head_dim": 24, **options})
        rows, heads, value_dim = len(case.map_index), case.query.shape[1], case.value.shape[3]
        other_scores = make((rows, heads, 9, 5), 70, torch.float64, self.device)
        other_value = make((rows, heads, 5, value_dim), 71, torch.float64, self.device)
        other_scores[0, :, 2] = -INF  # a row that has no other keys
        statistics = accumulator_dtype(case.query.dtype)
        prior = (other_scores.softmax(-1).nan_to_num() @ other_value).to(statistics)
        prior_logsumexp = other_scores.logsumexp(-1).to(statistics)

        def dense(part: Case) -> Tensor:
            index, dtype = list(case.map_index), part.query.dtype
            maps, own = attention_map(part.query, part.key, part.bias, part.factor, part.key_lengths)
            value = repeated(part.value, heads)
            total = torch.logaddexp(own[index].double(), prior_logsumexp.double())
            total = torch.where(total.isneginf(), 0.0, total)
            first, second = torch.exp(own[index] - total).to(dtype), torch.exp(prior_logsumexp - total).to(dtype)
            out = first.unsqueeze(-1) * (maps[index] @ value) + second.unsqueeze(-1) * prior.to(dtype)
            return out if part.row_weight is None else part.row_weight.unsqueeze(-1) * out

        rest = (list(case.map_index), case.factor, self.backend)
        lengths = case.key_lengths
        ops = torch.ops.fpe_kernels
        statistic = ops.apply(*operands(case), *rest, None, lengths)[1] if known else None
        out = ops.merge(*operands(case), statistic, *rest, prior, prior_logsumexp, case.row_weight, lengths)
        magnitude = case.magnitude["out"] + float(prior.abs().max())
        exact, plain = dense(case.to(torch.float64)), dense(case)
        assert_within_budget(out, plain, exact, case.query.dtype, magnitude, score_magnitude(case))
        assert out.transpose(1, 2).is_contiguous()

    def test_rows_of_a_joined_map_sum_to_one(self) -> None:
        case = self.case(queries=33, keys=40, heads=2)
        product = self.joined(case, (0, 7, 29, 40)) @ torch.ones_like(case.value)
        exact = torch.ones(product.shape, dtype=torch.float64, device=self.device)
        assert_within_budget(product, exact, exact, case.query.dtype, scores=score_magnitude(case))

    def test_joining_is_associative(self) -> None:
        case = self.case(queries=9, keys=17, maps=2)
        one, two, three = cut(self.attention_map(case), (0, 4, 12, 17))
        left, right = join([join([one, two]), three]), join([one, join([two, three])])
        assert left.logsumexp.isfinite().all()  # known from here on, for either
        assert torch.equal(left @ case.value, right @ case.value)
        # A gather in between keeps the inner one a map of its own.
        nested = join([join([one, two]).take([0, 1]), three])
        assert_matches(case, out=nested @ case.value, adjoint=nested.T @ case.weight, logsumexp=nested.logsumexp)

    def test_parts_may_come_in_any_order(self) -> None:
        case = self.case(queries=9, keys=17)
        cuts = ((12, 17), (0, 4), (4, 12))
        joined = join([self.attention_map(case).keys(*ends) for ends in cuts])
        value = torch.cat([case.value[:, :, start:stop] for start, stop in cuts], dim=2)
        adjoint = (joined.T @ case.weight).split([stop - start for start, stop in cuts], dim=2)
        adjoint = torch.cat([adjoint[1], adjoint[2], adjoint[0]], dim=2)
        assert_matches(case, out=joined @ value, adjoint=adjoint, logsumexp=joined.logsumexp)

    def test_one_part_is_itself(self) -> None:
        case = self.case(queries=9, keys=17)
        operator = self.attention_map(case)
        assert join([operator]) is operator
        assert join([operator, operator.keys(17, 17)]) is operator

    def test_maps_of_no_keys_are_zero(self) -> None:
        case = self.case(queries=9, keys=17)
        nothing = self.attention_map(case).keys(3, 3)
        assert nothing.shape == (1, 1, 9, 0)
        assert (nothing @ case.value[:, :, :0] == 0).all()
        assert (nothing.T @ case.weight).shape == (1, 1, 0, 16)
        assert nothing.logsumexp.isneginf().all()
        assert ((join([nothing, nothing]) @ case.value[:, :, :0]) == 0).all()

    def test_a_part_that_is_masked_throughout(self) -> None:
        case = self.case(queries=9, keys=17, maps=2, bias=(0, 0, 1, 1), masked=0.4)
        case.bias[..., 5:11] = -INF
        case.bias[:, :, 3] = -INF  # a row that sees no key at all
        joined = self.joined(case, (0, 5, 11, 17))
        out = joined @ case.value
        assert_matches(case, out=out, adjoint=joined.T @ case.weight, logsumexp=joined.logsumexp)
        assert (out[:, :, 3] == 0).all()
        assert joined.logsumexp[:, :, 3].isneginf().all()

    def test_key_lengths_equal_a_padding_bias(self) -> None:
        case = self.case(queries=9, keys=17, maps=2, key_lengths=(3, 12))
        padded = replace(case, key_lengths=None, bias=padding_bias([3, 12], 17, case.query.dtype, self.device))
        assert_matches(padded, out=self.joined(case, (0, 5, 17)) @ case.value)

    @costly
    def test_a_joined_map_is_rounded_once(self) -> None:
        for dtype in self.dtypes:
            case = self.case(dtype=dtype, queries=9, keys=64)
            joined = self.joined(case, range(0, 65, 4))
            assert joined.logsumexp.isfinite().all()  # known from here on, for either product
            wide, _ = joined.gathered_with_logsumexp(case.value, (0,))
            assert wide.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            out = joined @ case.value
            assert_matches(case, out=out)
            # Half of the last digit, and beside it what float32 sums in another order differ by.
            apart = torch.finfo(dtype).eps * 0.5 + 32 * torch.finfo(wide.dtype).eps
            assert ((out.to(wide.dtype) - wide).abs() <= apart * wide.abs() + 32 * torch.finfo(wide.dtype).eps).all()

    def test_a_tuple_of_values_is_one_pass_of_every_part(self) -> None:
        case = self.case(queries=9, keys=17)
        both = self.joined(case, (0, 5, 17)) @ (case.value, case.value[..., :3])
        assert_matches(case, out=both[0])
        torch.testing.assert_close(both[1], both[0][..., :3])

    def test_the_same_joined_maps_give_the_same_bits(self) -> None:
        case = self.case(queries=33, keys=40)
        first, second = (self.joined(case, (0, 7, 40)) @ case.value for _ in range(2))
        assert torch.equal(first, second)

    def check_entries(self, found: Tensor, case: Case, part: tuple) -> None:
        """``found`` against a range of the dense map."""
        exact, _ = attention_map(*(case.to(torch.float64).__dict__[n] for n in ("query", "key", "bias")), case.factor)
        plain, _ = attention_map(case.query, case.key, case.bias, case.factor)
        budget = (case.query.dtype, 1.0, score_magnitude(case))
        assert_within_budget(found, plain[part], exact[part], *budget)

    @pytest.mark.parametrize("joins", [False, True])
    def test_ranges_and_views_are_those_of_the_dense_map(self, joins: bool) -> None:
        case = self.case(queries=12, keys=20, heads=2, maps=2, bias=(0, 0, 1, 1), masked=0.3)
        operator = self.joined(case, (0, 5, 5, 13, 20)) if joins else self.attention_map(case)
        every, rows, keys = slice(None), slice(2, 7), slice(3, 15)
        self.check_entries(operator.dense(), case, (every,))
        self.check_entries(operator.rows([3, -1]), case, (every, every, [3, 11]))
        self.check_entries(operator.columns([4, 14, -1]), case, (every, every, every, [4, 14, 19]))
        self.check_entries(operator.queries(2, 7).dense(), case, (every, every, rows))
        self.check_entries(operator.block(keys=(3, 15)).dense(), case, (every, every, every, keys))
        self.check_entries(operator.block((2, 7), (3, 15)).dense(), case, (every, every, rows, keys))
        gathered = operator.take([1, 0, 1]).block((2, 7), (3, 15))
        self.check_entries(gathered.dense(), case, ([1, 0, 1], every, rows, keys))
        sums = operator.column_sums().unsqueeze(-1)
        ones = replace(case, weight=torch.ones_like(case.weight[..., :1]), value=case.value[..., :1])
        assert_matches(ones, adjoint=sums)
        pooled = operator.block(keys=(4, 20)).pooled((3, 4), (4, 4), 2)
        assert pooled.shape == (2, 2, 4, 4)

    @pytest.mark.parametrize("joins", [False, True])
    def test_a_range_of_keys_is_a_softmax_of_its_own(self, joins: bool) -> None:
        case = self.case(queries=9, keys=17, maps=2, bias=(0, 0, 1, 1), masked=0.3)
        operator = self.joined(case, (0, 5, 17)) if joins else self.attention_map(case)
        part = operator.keys(3, 14)
        own = replace(case, key=case.key[:, :, 3:14], bias=case.bias[..., 3:14], value=case.value[:, :, 3:14])
        assert_matches(own, out=part @ own.value, adjoint=part.T @ own.weight, logsumexp=part.logsumexp)

    def test_ranges_of_a_map_with_key_lengths(self) -> None:
        case = self.case(queries=9, keys=17, maps=2, key_lengths=(4, 12))
        operator = self.attention_map(case).queries(2, 6)
        own = replace(case, query=case.query[:, :, 2:6], weight=case.weight[:, :, 2:6])
        assert_matches(own, out=operator @ own.value, adjoint=operator.T @ own.weight)
        operator = self.attention_map(case).keys(3, 10)
        own = replace(case, key=case.key[:, :, 3:10], value=case.value[:, :, 3:10], key_lengths=(1, 7))
        assert_matches(own, out=operator @ own.value, adjoint=operator.T @ own.weight)

    def test_blocks_put_together_are_the_map(self) -> None:
        case = self.case(queries=12, keys=17, maps=2, heads=2, bias=(0, 0, 1, 1), masked=0.3)
        operator = self.attention_map(case)
        blocks = [[operator.block(rows, keys) for keys in ((0, 4), (4, 17))] for rows in ((0, 7), (7, 12))]
        whole = stack([beside(row) for row in blocks])
        assert whole.shape == operator.shape
        # Each product is rounded before the sum, as in any sum of maps.
        out, adjoint = whole @ case.value, whole.T @ case.weight
        assert_matches(case, out=out, adjoint=adjoint)
        taken = whole.queries(5, 9).take([1, 0])
        part = replace(case, query=case.query[:, :, 5:9], bias=case.bias[:, :, 5:9], weight=case.weight[:, :, 5:9])
        assert_matches(part, out=(taken @ case.value[[1, 0]])[[1, 0]])

    @pytest.mark.parametrize(
        "options",
        [
            {"maps": 2},
            {"bias": (0, 0, 1, 1), "masked": 0.4},
            {"heads": 4, "key_heads": 2, "value_heads": 2},
            {"maps": 2, "key_lengths": (3, 12)},
        ],
        ids=str,
    )
    def test_gradients_of_a_joined_product(self, options: dict) -> None:
        case = self.case(**{"queries": 9, "keys": 17, **options})
        leaves = {"query": case.query, "key": case.key, "value": case.value, "bias": case.bias}
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
        whole = replace(case, **leaves)
        out = self.joined(whole, (0, 5, 11, 17)) @ whole.value
        found = torch.autograd.grad(out, list(leaves.values()), case.weight)
        assert_matches(case, **{f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)})

    @pytest.mark.parametrize("name", ["adjoint", "logsumexp", "rows", "block"])
    def test_gradients_of_what_else_a_joined_map_gives(self, name: str) -> None:
        case = self.case(queries=9, keys=17, bias=(0, 0, 1, 1), masked=0.2)

        def results(operator: LinearMap, value: Tensor, weight: Tensor) -> Tensor:
            return {
                "adjoint": lambda: operator.T @ weight,
                "logsumexp": lambda: operator.logsumexp,
                "rows": lambda: torch.cat([operator.rows([1, 4]).flatten(), operator.columns([0, 9]).flatten()]),
                "block": lambda: operator.block((1, 7), (3, 13)) @ value[:, :, 3:13],
            }[name]()

        def found(query, key, bias, value, weight, row_weight) -> Tensor:
            operator = AttentionMap(query, key, bias=bias, backend=self.backend)
            return results(join(cut(operator, (0, 5, 11, 17))), value, weight)

        def dense(query, key, bias, value, weight, row_weight) -> Tensor:
            maps, logsumexp = attention_map(query, key, bias, case.factor)
            return {
                "adjoint": lambda: maps.transpose(-1, -2) @ weight,
                "logsumexp": lambda: logsumexp,
                "rows": lambda: torch.cat([maps[:, :, [1, 4]].flatten(), maps[..., [0, 9]].flatten()]),
                "block": lambda: maps[:, :, 1:7, 3:13] @ value[:, :, 3:13],
            }[name]()

        exact, plain = gradients(dense, case, torch.float64), gradients(dense, case)
        wanted = gradients(found, case)
        assert wanted.keys() == exact.keys()
        for leaf, grad in wanted.items():
            magnitude = max(1.0, float(exact[leaf].abs().max()))
            budget = (case.query.dtype, magnitude, score_magnitude(case), leaf)
            assert_within_budget(grad, plain[leaf], exact[leaf], *budget)

    def test_gradients_of_rows_and_parts_that_are_masked_throughout(self) -> None:
        case = self.case(queries=9, keys=17, bias=(0, 0, 1, 1), masked=0.2)
        case.bias[..., 5:11] = -INF
        case.bias[:, :, 3] = -INF
        leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value, case.bias)]
        joined = join(cut(AttentionMap(*leaves[:2], bias=leaves[3], backend=self.backend), (0, 5, 11, 17)))
        found = torch.autograd.grad(joined @ leaves[2], leaves, case.weight)
        assert_matches(case, **dict(zip(("grad_query", "grad_key", "grad_value", "grad_bias"), found, strict=True)))

    def test_a_shared_part_gets_the_gradients_of_all_rows(self) -> None:
        query = make((1, 1, 9, 8), 0, self.dtypes[0], self.device)
        shared = make((1, 1, 11, 8), 1, self.dtypes[0], self.device)
        private = make((3, 1, 6, 8), 2, self.dtypes[0], self.device)
        value = make((3, 1, 17, 8), 3, self.dtypes[0], self.device)
        whole = torch.cat([private, shared.expand(3, -1, -1, -1)], dim=2)
        case = Case(query.expand(3, -1, -1, -1), whole, value, value[:, :, :9], (0, 1, 2))

        def through(dtype: torch.dtype, dense: bool) -> list[Tensor]:
            q, s, p, v = leaves = [t.detach().to(dtype).requires_grad_() for t in (query, shared, private, value)]
            many = q.expand(3, -1, -1, -1)
            if dense:
                keys = torch.cat([p, s.expand(3, -1, -1, -1)], dim=2)
                out = attention_map(many, keys, None, 8**-0.5)[0] @ v
            else:
                image = AttentionMap(q, s, backend=self.backend).take([0, 0, 0])
                out = join([AttentionMap(many, p, backend=self.backend), image]) @ v
            seed = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out)
            return list(torch.autograd.grad(out, leaves, seed))

        dtype = self.dtypes[0]
        everything = through(dtype, False), through(dtype, True), through(torch.float64, True)
        for found, plain, exact in zip(*everything, strict=True):
            assert_within_budget(found, plain, exact, dtype, scores=score_magnitude(case))
