"""``AttentionMap`` as a Python object: views of a few entries, indexing, movement, and what it keeps."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fpe_kernels import AttentionMap
from fpe_kernels.testing import Case, assert_matches, assert_within_budget, make_case, score_magnitude


def operator_of(case: Case, **options) -> AttentionMap:
    return AttentionMap(case.query, case.key, scale=case.scale, bias=case.bias, **options)


def dense_of(case: Case, dtype: torch.dtype) -> Tensor:
    case = case.to(dtype)
    scores = case.factor * (case.query @ case.key.transpose(-1, -2))
    return torch.softmax(scores if case.bias is None else scores + case.bias, dim=-1)


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(maps=2, queries=12, keys=20, bias=(1, 0, 0, 1), masked=0.2, dtype=request.param)


def check_entries(found: Tensor, case: Case, view) -> None:
    plain, exact = view(dense_of(case, case.query.dtype)), view(dense_of(case, torch.float64))
    assert found.dtype == case.query.dtype
    assert_within_budget(found, plain, exact, case.query.dtype, 1.0, score_magnitude(case))


class CountedOps:
    """Counts the calls of the backend's apply and adjoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fpe_kernels.backends import chunked

        self.calls: list[str] = []
        for name in ("apply", "adjoint"):
            self._count(monkeypatch, chunked, name)

    def _count(self, monkeypatch: pytest.MonkeyPatch, module, name: str) -> None:
        original = getattr(module, name)

        def counted(*args):
            known = name == "apply" and args[4]
            self.calls.append("replay" if known else name)
            return original(*args)

        monkeypatch.setattr(module, name, counted)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CountedOps:
    return CountedOps(monkeypatch)


@pytest.mark.parametrize("index", [3, -1, [0], [11, 2, 2, -3], (1, 4), torch.tensor([5, 0])], ids=str)
def test_rows(case: Case, index) -> None:
    flat = torch.as_tensor(index).reshape(-1)
    check_entries(operator_of(case).rows(index), case, lambda dense: dense[:, :, flat])


@pytest.mark.parametrize("index", [3, -1, [0], [19, 2, 2, -3], (1, 4), torch.tensor([5, 0])], ids=str)
def test_columns(case: Case, index) -> None:
    flat = torch.as_tensor(index).reshape(-1)
    check_entries(operator_of(case).columns(index), case, lambda dense: dense[..., flat])


def test_no_rows_and_no_columns(case: Case) -> None:
    assert operator_of(case).rows([]).shape == (2, 2, 0, 20)
    assert operator_of(case).columns(torch.empty(0, dtype=torch.int64)).shape == (2, 2, 12, 0)


@pytest.mark.parametrize("index", [list(range(0, 130, 2)), torch.tensor([3, -1]), []], ids=["many", "tensor", "none"])
def test_positions_need_no_default_device(index) -> None:
    operator = operator_of(make_case(queries=130, keys=130))
    expected = operator.rows(index), operator.columns(index)
    with torch.device("meta"):  # as a default of CUDA, not where the map is
        found = operator.rows(index), operator.columns(index)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_rows_take_a_bias_that_varies_over_the_queries(case: Case) -> None:
    case = make_case(queries=12, keys=20, bias=(0, 0, 1, 0))
    check_entries(operator_of(case).rows([7, 1]), case, lambda dense: dense[:, :, [7, 1]])
    case = make_case(queries=12, keys=20, bias=(0, 0, 1, 1), masked=0.3)
    check_entries(operator_of(case).columns([7, 1]), case, lambda dense: dense[..., [7, 1]])


@pytest.mark.parametrize("padding", [float("nan"), 60.0], ids=["nothing", "large scores"])
@pytest.mark.parametrize(
    "view",
    [
        lambda a: a.rows([1, 5]),
        lambda a: a.columns([0, 19]),
        lambda a: a.dense(),
        lambda a: a.block(keys=(8, 20)).rows(1),
    ],
    ids=["rows", "columns", "dense", "rows of a block"],
)
def test_gradients_of_views_do_not_see_what_padding_holds(view, padding: float) -> None:
    case = make_case(maps=2, queries=12, keys=20)
    lengths = [13, 0]

    def gradients(filling: float) -> tuple[Tensor, ...]:
        query, key = case.query.clone(), case.key.clone()
        for keys, length in zip(key, lengths, strict=True):
            keys[:, length:] = filling * keys[:, length:].sign()
        leaves = query.requires_grad_(), key.requires_grad_()
        return torch.autograd.grad(view(AttentionMap(*leaves, scale=1.0, key_lengths=lengths)).square().sum(), leaves)

    for found, wanted in zip(gradients(padding), gradients(0.0), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_rows_that_are_masked_throughout_are_zero() -> None:
    case = make_case(queries=4, keys=5, bias=(0, 0, 1, 1))
    case.bias[:, :, 2] = -float("inf")
    assert (operator_of(case).rows(2) == 0).all()
    assert (operator_of(case).dense()[:, :, 2] == 0).all()


@pytest.mark.parametrize(("grids", "size"), [(((3, 4), (4, 5)), 2), (((2, 6), (10, 2)), (2, 1)), (((4, 3), (4, 5)), 3)])
def test_pooled_is_adaptive_pooling_of_the_dense_map(case: Case, grids, size) -> None:
    (query_h, query_w), (key_h, key_w) = grids
    height, width = (size, size) if isinstance(size, int) else size

    def pooled(dense: Tensor) -> Tensor:
        by_key = F.adaptive_avg_pool2d(dense.reshape(-1, 1, key_h, key_w), (height, width))
        by_key = by_key.reshape(4, query_h, query_w, -1).permute(0, 3, 1, 2)
        both = F.adaptive_avg_pool2d(by_key, (height, width))
        return both.permute(0, 2, 3, 1).reshape(2, 2, height * width, height * width)

    check_entries(operator_of(case).pooled(*grids, size), case, pooled)


def test_dense_is_the_softmax(case: Case) -> None:
    check_entries(operator_of(case).dense(), case, lambda dense: dense)


def test_dense_refuses_past_its_limit(case: Case) -> None:
    operator = operator_of(case)
    needed = 2 * 2 * 12 * 20 * case.query.element_size()
    with pytest.raises(ValueError, match=rf"takes {needed:,} bytes, more than max_bytes={needed - 1:,}.*A\.rows"):
        operator.dense(max_bytes=needed - 1)
    assert operator.dense(max_bytes=needed).shape == operator.shape


def test_logsumexp_is_computed_once(counted: CountedOps) -> None:
    case = make_case(queries=12, keys=20)
    operator = operator_of(case)
    assert_matches(case, logsumexp=operator.logsumexp)
    assert operator.logsumexp is operator.logsumexp
    operator @ case.value
    operator.T @ case.weight
    operator.rows(0)
    operator.column_sums()
    assert counted.calls == ["apply", "replay", "adjoint", "adjoint"]


def test_the_first_product_leaves_its_logsumexp(counted: CountedOps) -> None:
    case = make_case(queries=12, keys=20)
    operator = operator_of(case)
    assert_matches(case, out=operator @ case.value)
    assert_matches(case, logsumexp=operator.logsumexp)
    assert counted.calls == ["apply"]


def test_a_tuple_is_one_pass(counted: CountedOps) -> None:
    case = make_case(queries=12, keys=20)
    operator_of(case) @ [case.value, case.value, case.value[..., :3]]
    assert counted.calls == ["apply"]


def test_a_recorded_logsumexp_is_used(counted: CountedOps) -> None:
    case = make_case(queries=12, keys=20)
    recorded = operator_of(case).logsumexp
    assert_matches(case, out=operator_of(case, logsumexp=recorded) @ case.value)
    assert counted.calls == ["apply", "replay"]


@pytest.mark.parametrize("view", [lambda a: a.rows([1]), lambda a: a.columns([1]), lambda a: a.logsumexp])
def test_gradients_do_not_depend_on_how_the_logsumexp_came_about(view) -> None:
    case = make_case(queries=12, keys=20)
    query = case.query.requires_grad_()

    def gradient(operator: AttentionMap) -> Tensor:
        return torch.autograd.grad(view(operator).square().sum(), query)[0]

    expected = gradient(operator_of(case))
    early = operator_of(case)
    with torch.no_grad():
        early @ case.value
    torch.testing.assert_close(gradient(early), expected, rtol=0, atol=0)
    recorded = operator_of(case, logsumexp=early.detach().logsumexp)
    torch.testing.assert_close(gradient(recorded), expected, rtol=0, atol=0)


def test_a_product_needs_no_earlier_graph() -> None:
    case = make_case(queries=12, keys=20)
    query = case.query.requires_grad_()
    operator = operator_of(case)
    (operator @ case.value).sum().backward()
    query.grad = None
    ((operator @ case.value) * case.weight).sum().backward()
    assert_matches(case, grad_query=query.grad)


def test_a_product_does_not_run_an_earlier_backward(counted: CountedOps) -> None:
    case = make_case(queries=12, keys=20)
    value = case.value.requires_grad_()
    operator = operator_of(case)
    operator @ value
    (operator @ value).sum().backward()
    assert counted.calls == ["apply", "replay", "adjoint"]


@pytest.mark.parametrize("changed", ["query", "key", "bias"])
@pytest.mark.parametrize("part", [lambda a: a, lambda a: a[0], lambda a: a.detach()], ids=["whole", "row", "detached"])
def test_a_change_in_place_is_seen(changed: str, part, counted: CountedOps) -> None:
    case = make_case(queries=12, keys=20, bias=(1, 0, 0, 1))
    operator = operator_of(case)
    operator @ case.value
    operator = part(operator)
    operator @ case.value
    assert counted.calls == ["apply", "replay"]
    getattr(case, changed)[..., :4].mul_(0.1).add_(1.0)
    fresh = make_case(queries=12, keys=20, bias=(1, 0, 0, 1))
    case = replace(fresh, query=case.query, key=case.key, bias=case.bias)
    assert_matches(case, out=operator @ case.value, logsumexp=operator.logsumexp)
    assert_matches(case, adjoint=operator.T @ case.weight)
    assert counted.calls == ["apply", "replay", "apply", "adjoint"]


@pytest.mark.parametrize(
    "part", [lambda a: a, lambda a: a.queries(0), lambda a: a.detach()], ids=["it", "view", "twin"]
)
def test_a_logsumexp_that_its_owner_changes_is_computed_again(part) -> None:
    case = make_case(queries=12, keys=20)
    operator = operator_of(case)
    operator.logsumexp.exp_()
    assert_matches(case, out=operator @ case.value)
    given, operator = operator.logsumexp, part(operator)
    given.sub_(1.0)
    assert_matches(case, out=operator @ case.value, logsumexp=operator.logsumexp)


def test_another_query_is_seen_whatever_its_id() -> None:
    operator, value = AttentionMap(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)), torch.eye(5).expand(1, 1, 5, 5)
    for number in range(20):
        operator.query = torch.randn(1, 1, 3, 4)  # a second one may be given the id of the freed one before
        if number % 2:
            torch.testing.assert_close((operator @ value).sum(-1), torch.ones(1, 1, 3))


def test_another_scale_or_length_is_seen() -> None:
    case = make_case(queries=12, keys=20)
    operator = AttentionMap(case.query, case.key)
    operator @ case.value
    operator.scale = 0.5
    torch.testing.assert_close(operator @ case.value, AttentionMap(case.query, case.key, scale=0.5) @ case.value)
    operator.key_lengths = (7,) * case.key.shape[0]
    expected = AttentionMap(case.query, case.key, scale=0.5, key_lengths=operator.key_lengths) @ case.value
    torch.testing.assert_close(operator @ case.value, expected)


def test_copies_count_their_own_changes() -> None:
    case = make_case(queries=12, keys=20)
    for _ in range(10):
        case.query.mul_(1.0)
    operator = operator_of(case)
    operator @ case.value
    copied = copy.deepcopy(operator)
    assert_matches(case, out=copied @ case.value)
    copied.query.mul_(0.1)
    for _ in range(30):  # passes the count of the original, whatever it starts from
        copied.query.mul_(1.0)
        case = replace(make_case(queries=12, keys=20), query=copied.query.clone())
        result = copied @ case.value
    assert_matches(case, out=result)


def test_what_inference_mode_left_serves_gradients(counted: CountedOps) -> None:
    case = make_case(queries=12, keys=20)
    recorded = operator_of(case)
    with torch.inference_mode():
        recorded @ case.value
        given = operator_of(case).logsumexp
    value = case.value.requires_grad_()
    for operator in (recorded, operator_of(case, logsumexp=given)):
        (grad,) = torch.autograd.grad(operator @ value, value, case.weight)
        assert_matches(case, grad_value=grad)
    assert counted.calls == ["apply", "apply", "replay", "adjoint", "replay", "adjoint"]


def test_a_compiled_function_does_not_rely_on_what_it_cannot_check() -> None:
    case = make_case(queries=12, keys=20)
    operator = operator_of(case)
    compiled = torch.compile(lambda value: operator.matmul(value), fullgraph=True, backend="aot_eager")
    assert_matches(case, out=compiled(case.value))
    case.query.mul_(0.1)
    case = replace(make_case(queries=12, keys=20), query=case.query)
    assert_matches(case, out=compiled(case.value))
    assert_matches(case, out=operator @ case.value)
    case.query.mul_(3.0)
    case = replace(make_case(queries=12, keys=20), query=case.query)
    assert_matches(case, out=compiled(case.value))


def test_what_it_says_of_itself(case: Case) -> None:
    operator = operator_of(case)
    assert operator.shape == (2, 2, 12, 20)
    assert operator.T.shape == (2, 2, 20, 12)
    assert operator.T.T is operator
    assert (operator.dtype, operator.device) == (case.query.dtype, case.query.device)
    size = case.query.element_size()
    assert operator.nbytes == size * (2 * 2 * 12 * 16 + 2 * 2 * 20 * 16 + 2 * 20)
    assert repr(operator) == (
        f"AttentionMap(shape=(2, 2, 12, 20), dtype={case.query.dtype}, device='cpu', backend='auto', scale=0.25, "
        f"nbytes={operator.nbytes})"
    )
    assert repr(operator.T) == repr(operator) + ".T"
    before = operator.nbytes
    assert operator.logsumexp.dtype == torch.float32
    assert operator.nbytes == before + 2 * 2 * 12 * 4


@pytest.mark.parametrize("index", [0, -1, slice(1, None), [1, 0], (0, 0, 1)], ids=str)
@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("bias", [(1, 0, 0, 1), (0, 1, 1, 1)], ids=["bias per row", "one bias"])
def test_indexing_is_the_map_of_some_batch_rows(index, computed: bool, bias) -> None:
    case = make_case(maps=2, queries=12, keys=20, bias=bias)
    operator = operator_of(case)
    if computed:
        assert operator.logsumexp.isfinite().all()
    chosen = [index % 2] if isinstance(index, int) else list(range(2))[index] if isinstance(index, slice) else index
    rows = list(chosen)
    part = replace(
        case,
        query=case.query[rows],
        key=case.key[rows],
        value=case.value[rows],
        weight=case.weight[rows],
        bias=case.bias[rows] if case.bias.shape[0] > 1 else case.bias,
        map_index=tuple(range(len(rows))),
    )
    assert_matches(part, out=operator[index] @ part.value, logsumexp=operator[index].logsumexp)


def test_iteration_goes_over_the_batch() -> None:
    case = make_case(maps=3)
    assert [part.shape[0] for part in operator_of(case)] == [1, 1, 1]


def test_indexing_refuses_what_it_cannot_mean() -> None:
    operator = operator_of(make_case(maps=2))
    with pytest.raises(IndexError, match="batch index 2 is out of range for 2 row"):
        operator[2]
    with pytest.raises(TypeError, match="an int, a slice or a list of ints over the batch, got float"):
        operator[0.5]
    for index in ([0.5], [True, False], (0, None)):
        with pytest.raises(TypeError, match=r"a list of ints over the batch, got [\[(].*[\])]"):
            operator[index]
    with pytest.raises(IndexError, match="batch index -3 is out of range for 2 row"):
        operator[[0, -3]]


def test_a_dtype_change_drops_the_logsumexp(counted: CountedOps) -> None:
    case = make_case(queries=12, keys=20)
    operator = operator_of(case)
    kept = operator.logsumexp
    assert torch.equal(operator.to("cpu").logsumexp, kept)
    assert counted.calls == ["apply"]
    assert operator.to(torch.float64).logsumexp.dtype == torch.float64
    assert counted.calls == ["apply", "apply"]
    assert_matches(case.to(torch.float16), out=operator.to(torch.float16) @ case.value.half())


def test_detach_keeps_numbers_and_drops_history(counted: CountedOps) -> None:
    case = make_case(queries=12, keys=20)
    case.query.requires_grad_()
    operator = operator_of(case)
    assert (operator @ case.value).requires_grad
    detached = operator.detach()
    assert not (detached @ case.value).requires_grad
    assert not detached.logsumexp.requires_grad
    assert not (detached.T @ case.weight).requires_grad
    assert counted.calls == ["apply", "replay", "adjoint"]


def test_methods_are_what_the_operators_are(case: Case) -> None:
    assert torch.equal(operator_of(case).matmul(case.value), operator_of(case) @ case.value)
    assert torch.equal(operator_of(case).T.matmul(case.weight), operator_of(case).T @ case.weight)
