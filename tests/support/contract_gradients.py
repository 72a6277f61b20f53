"""The part of the contract that concerns gradients; every gradient is judged against float64 autograd or equations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fpe_kernels import AttentionMap, shared_attention
from fpe_kernels.backends.reference import attention_map
from fpe_kernels.testing import LAYOUTS, Case, assert_matches, assert_within_budget, score_magnitude
from tests.support.contract import ProductContract

LEAVES = ("query", "key", "bias", "value", "weight", "row_weight")
Function = Callable[..., Tensor]


def leaves_of(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """The tensors of ``case`` as leaves that want gradients, with their strides."""
    leaves = {}
    for name in LEAVES:
        tensor = getattr(case, name)
        if tensor is not None:
            tensor = tensor.detach() if dtype is None else tensor.detach().to(dtype)
            tensor = tensor.requires_grad_()
        leaves[name] = tensor
    return leaves


def gradients(function: Function, case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Gradients of ⟨function(leaves), weights⟩ with fixed weights, for every leaf that it depends on."""
    leaves = leaves_of(case, dtype)
    result = function(**leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    seed = torch.cos(torch.arange(result.numel(), dtype=torch.float64)).view(result.shape)
    found = torch.autograd.grad(result, list(wanted.values()), seed.to(result), allow_unused=True)
    return {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}


class GradientContract(ProductContract):
    """What every backend owes for the gradients of query, key, bias and operand."""

    def check_gradients(self, seed: int = 0, **options) -> None:
        case = self.case(seed, **options)
        leaves = leaves_of(case)
        out = shared_attention(
            leaves["query"],
            leaves["key"],
            leaves["value"],
            case.map_index,
            scale=case.scale,
            bias=leaves["bias"],
            weight=leaves["row_weight"],
            key_lengths=case.key_lengths,
            backend=self.backend,
        )
        wanted = [name for name in ("query", "key", "value", "bias", "row_weight") if leaves[name] is not None]
        found = torch.autograd.grad(out, [leaves[name] for name in wanted], case.weight)
        assert_matches(case, **{f"grad_{name}": grad for name, grad in zip(wanted, found, strict=True)})

    def check_function(self, function: Function, dense: Function, case: Case) -> None:
        """Compare the gradients of ``function`` with float64 autograd through ``dense``, its dense equations."""
        exact = gradients(dense, case, torch.float64)
        plain = gradients(dense, case)
        found = gradients(function, case)
        assert found.keys() == exact.keys()
        for name, grad in found.items():
            assert_within_budget(
                grad, plain[name], exact[name], case.query.dtype, scores=score_magnitude(case), name=name
            )

    def operator(self, query: Tensor, key: Tensor, bias: Tensor | None) -> AttentionMap:
        return AttentionMap(query, key, bias=bias, backend=self.backend)

    @pytest.mark.parametrize(
        "options",
        [
            {"queries": 65, "keys": 70, "head_dim": 40},
            {"queries": 5, "keys": 3, "head_dim": 72, "value_dim": 24},
            {"maps": 3, "map_index": (2, 0, 2), "queries": 9, "keys": 17},
            {"map_index": (0,) * 5, "queries": 9, "keys": 17, "head_dim": 40},  # more columns than a launch
            {"value_dim": 200, "queries": 9, "keys": 17},
            {"scale": -0.4, "queries": 9, "keys": 17, "head_dim": 160},
            {"scale": 0.0, "queries": 9, "keys": 17, "bias": (0, 0, 1, 1)},
            pytest.param({"queries": 257, "keys": 300, "head_dim": 80, "map_index": (0, 0)}, marks=pytest.mark.costly),
        ],
        ids=str,
    )
    def test_gradients(self, options: dict) -> None:
        self.check_gradients(**options)

    @pytest.mark.parametrize(
        "options",
        [
            {"row_weight": (0, 0, 1)},
            {"row_weight": (1, 1, 1), "bias": (0, 0, 1, 1), "masked": 0.3, "map_index": (1, 0, 1), "maps": 2},
            {"row_weight": (1, 0, 0), "map_index": (0,) * 5, "head_dim": 40},  # more columns than a launch
            {"row_weight": (1, 0, 1), "unweighted": 1.0},  # no key is read, and the weights have gradients all the same
            pytest.param({"row_weight": (0, 0, 0), "value_dim": 200}, marks=pytest.mark.costly),
        ],
        ids=str,
    )
    def test_gradients_with_row_weights(self, options: dict) -> None:
        self.check_gradients(**{"queries": 9, "keys": 17, **options})

    @pytest.mark.parametrize(
        "options",
        [
            {"key_lengths": (5, 17, 0), "maps": 3, "map_index": (1, 0, 1, 2)},
            {"key_lengths": (5,), "bias": (0, 0, 1, 1), "masked": 0.3, "keys": 40},
            {"key_lengths": (66,), "keys": 140, "head_dim": 40, "map_index": (0,) * 5},  # more columns than a launch
            {"heads": 4, "key_heads": 2, "value_heads": 2},
            {"heads": 4, "key_heads": 1, "value_heads": 4, "map_index": (0, 0), "bias": (0, 1, 0, 1)},
            {"heads": 4, "key_heads": 2, "value_heads": 2, "key_lengths": (7,), "row_weight": (1, 0, 1)},
            {"heads": 2, "key_heads": 1, "value_heads": 1, "map_index": (0,) * 5, "head_dim": 40},
        ],
        ids=str,
    )
    def test_gradients_with_key_lengths_and_grouped_heads(self, options: dict) -> None:
        self.check_gradients(**{"queries": 9, "keys": 17, **options})

    @pytest.mark.costly
    def test_gradients_of_grouped_heads_in_every_dtype(self) -> None:
        for dtype in self.dtypes:
            self.check_gradients(dtype=dtype, queries=17, keys=70, heads=4, key_heads=1, value_heads=1)

    def test_keys_past_the_length_have_no_gradient(self) -> None:
        case = self.case(queries=9, keys=80, key_lengths=(66,), head_dim=8)
        case.value[:, :, 66:] = float("nan")
        case.key[:, :, 66:] = float("nan")
        leaves = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]
        out = shared_attention(*leaves, [0], key_lengths=[66], backend=self.backend)
        grads = torch.autograd.grad(out, leaves, case.weight)
        assert all(grad.isfinite().all() for grad in grads)
        assert not any(grad[:, :, 66:].any() for grad in grads[1:])

    def test_gradients_where_whole_tiles_have_no_weight(self) -> None:
        case = self.case(queries=150, keys=9, head_dim=8, row_weight=(0, 0, 1), bias=(0, 0, 0, 1), masked=0.3)
        case.row_weight[..., :140] = 0.0

        def product(query, key, bias, value, weight, row_weight) -> Tensor:
            return shared_attention(query, key, value, [0], bias=bias, weight=row_weight, backend=self.backend)

        def dense(query, key, bias, value, weight, row_weight) -> Tensor:
            return row_weight.unsqueeze(-1) * (attention_map(query, key, bias, query.shape[-1] ** -0.5)[0] @ value)

        self.check_function(product, dense, case)

    def test_gradients_in_every_dtype(self) -> None:
        for dtype in self.dtypes:
            self.check_gradients(dtype=dtype, queries=17, keys=70, head_dim=40, map_index=(0, 0), layout="fused_chunk")

    @pytest.mark.parametrize(
        "layout", [pytest.param(name, marks=[] if name == "channels_first" else pytest.mark.costly) for name in LAYOUTS]
    )
    def test_gradients_for_layouts(self, layout: str) -> None:
        self.check_gradients(layout=layout, maps=2, map_index=(1, 1), heads=2, queries=9, keys=17, head_dim=24)

    @pytest.mark.parametrize(
        "varies",
        [(0, 0, 1, 1), (1, 0, 0, 1), (0, 1, 1, 0), (1, 1, 1, 1)]
        + [pytest.param(varies, marks=pytest.mark.costly) for varies in [(0, 0, 0, 0), (1, 1, 0, 0), (0, 1, 0, 1)]],
    )
    def test_gradients_of_a_bias_that_is_broadcast(self, varies: tuple[int, ...]) -> None:
        self.check_gradients(bias=varies, masked=0.2, maps=2, map_index=(1, 0, 1), heads=2, queries=9, keys=66)

    def test_rows_masked_throughout_give_zero_gradients(self) -> None:
        case = self.case(queries=9, keys=17, bias=(0, 0, 1, 1))
        case.bias[:, :, [0, 8]] = -float("inf")

        def product(query: Tensor, key: Tensor, bias: Tensor, value: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
            return self.operator(query, key, bias) @ value

        def dense(query: Tensor, key: Tensor, bias: Tensor, value: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
            # Autograd through softmax gives NaN for such a row, so it is left out and put back as zeros.
            seen = slice(1, 8)
            maps, _ = attention_map(query[:, :, seen], key, bias[:, :, seen], query.shape[-1] ** -0.5)
            return torch.nn.functional.pad(maps @ value, (0, 0, 1, 1))

        self.check_function(product, dense, case)
        grads = gradients(product, case)
        assert (grads["query"][:, :, [0, 8]] == 0).all()
        assert (grads["bias"][:, :, [0, 8]] == 0).all()

    @pytest.mark.parametrize("bias", [None, (0, 1, 0, 1)])
    def test_gradients_of_the_adjoint(self, bias: tuple[int, ...] | None) -> None:
        case = self.case(queries=9, keys=17, heads=2, bias=bias)

        def adjoint(
            query: Tensor, key: Tensor, bias: Tensor | None, value: Tensor, weight: Tensor, **_: Tensor
        ) -> Tensor:
            return self.operator(query, key, bias).T @ weight

        def dense(
            query: Tensor, key: Tensor, bias: Tensor | None, value: Tensor, weight: Tensor, **_: Tensor
        ) -> Tensor:
            maps, _ = attention_map(query, key, bias, query.shape[-1] ** -0.5)
            return maps.transpose(-1, -2) @ weight

        self.check_function(adjoint, dense, case)

    def test_gradients_of_the_logsumexp(self) -> None:
        case = self.case(queries=9, keys=17, heads=2, bias=(0, 1, 0, 1))

        def statistics(query: Tensor, key: Tensor, bias: Tensor, value: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
            return self.operator(query, key, bias).logsumexp

        def dense(query: Tensor, key: Tensor, bias: Tensor, value: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
            return attention_map(query, key, bias, query.shape[-1] ** -0.5)[1]

        self.check_function(statistics, dense, case)

    def test_gradients_of_product_and_logsumexp_together(self) -> None:
        case = self.case(queries=9, keys=17)

        def both(query: Tensor, key: Tensor, bias: None, value: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
            operator = self.operator(query, key, bias)
            product = operator @ value
            return torch.cat([product, operator.logsumexp.unsqueeze(-1).to(product.dtype)], dim=-1)

        def dense(query: Tensor, key: Tensor, bias: None, value: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
            maps, logsumexp = attention_map(query, key, bias, query.shape[-1] ** -0.5)
            return torch.cat([maps @ value, logsumexp.unsqueeze(-1)], dim=-1)

        self.check_function(both, dense, case)

    def test_gradients_of_a_second_product_from_the_kept_logsumexp(self) -> None:
        case = self.case(queries=9, keys=17, bias=(0, 0, 0, 1))

        def second(query: Tensor, key: Tensor, bias: Tensor, value: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
            operator = self.operator(query, key, bias)
            return operator @ value + 2.0 * (operator @ value.flip(-1))

        def dense(query: Tensor, key: Tensor, bias: Tensor, value: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
            maps, _ = attention_map(query, key, bias, query.shape[-1] ** -0.5)
            return maps @ value + 2.0 * (maps @ value.flip(-1))

        self.check_function(second, dense, case)

    @pytest.mark.parametrize("view", ["rows", "columns"])
    def test_gradients_of_a_few_entries(self, view: str) -> None:
        case = self.case(queries=9, keys=17)

        def entries(query: Tensor, key: Tensor, bias: None, value: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
            return getattr(self.operator(query, key, bias), view)([1, 5])

        def dense(query: Tensor, key: Tensor, bias: None, value: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
            maps, _ = attention_map(query, key, bias, query.shape[-1] ** -0.5)
            return maps[:, :, [1, 5]] if view == "rows" else maps[..., [1, 5]]

        self.check_function(entries, dense, case)

    def test_the_same_inputs_give_the_same_gradient_bits(self) -> None:
        case = self.case(queries=9, keys=70, map_index=(0, 0), bias=(0, 1, 1, 1))

        def product(query: Tensor, key: Tensor, bias: Tensor, value: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
            return shared_attention(query, key, value, case.map_index, bias=bias, backend=self.backend)

        first, second = gradients(product, case), gradients(product, case)
        for name, grad in first.items():
            assert torch.equal(grad, second[name]), name
