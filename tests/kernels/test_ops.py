"""The ops as PyTorch sees them: schemas, fakes, autograd, compilation, and transforms that are refused."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpe_kernels import AttentionMap, blend, gradient_rules, join, ops, shared_attention, stack
from fpe_kernels.backends import blocks, fused_cpu
from fpe_kernels.testing import Case, assert_matches, make_case
from tests.support.slow_cases import few

APPLY = torch.ops.fpe_kernels


@pytest.fixture
def small(backend) -> Case:
    return make_case(
        maps=2, map_index=(1, 0, 1), heads=1, queries=5, keys=6, head_dim=8, bias=(0, 0, 1, 1), device=backend.device
    )


def arguments(case: Case, backend: str, gradients: bool = True) -> dict[str, tuple]:
    """Valid arguments of every op."""
    tensors = [tensor.detach().requires_grad_(gradients) for tensor in (case.query, case.key, case.value, case.weight)]
    query, key, value, weight = tensors
    bias = case.bias.detach().requires_grad_(gradients)
    rest = (list(case.map_index), case.factor, backend)
    _, logsumexp = APPLY.apply(query.detach(), key.detach(), value.detach(), bias.detach(), *rest)
    delta = torch.zeros_like(logsumexp)
    factors = (query.detach(), key.detach(), weight.detach(), value.detach(), delta, bias.detach(), logsumexp)
    return {
        "apply": (query, key, value, bias, *rest),
        "replay": (query, key, value, bias, logsumexp, *rest),
        "adjoint": (query, key, weight, bias, logsumexp, *rest),
        "score_gradient": (*factors, *rest),
        "bias_gradient": (*factors, *rest[:2]),
    }


@pytest.mark.parametrize("name", ["apply", "replay", "adjoint", "score_gradient", "bias_gradient"])
def test_opcheck(name: str, small: Case, backend) -> None:
    checks = ["test_schema", "test_faketensor"]
    differentiable = name in ("apply", "replay", "adjoint")
    if differentiable:
        checks += ["test_autograd_registration"]
    if differentiable and backend.name == "torch":
        checks += ["test_aot_dispatch_dynamic"]  # slow, and above the choice of a backend
    torch.library.opcheck(
        getattr(APPLY, name).default, arguments(small, backend.name, differentiable)[name], test_utils=checks
    )


@pytest.mark.parametrize("name", ["reference", "torch", "torch in small blocks"])
@pytest.mark.parametrize("bias", [None, (0, 1, 0, 1)])
def test_gradcheck(name: str, bias, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "torch in small blocks":
        name = "torch"
        monkeypatch.setattr(fused_cpu, "_serves", lambda *tensors: False)
        monkeypatch.setattr(blocks, "WHOLE_KEYS", 2)
        monkeypatch.setattr(blocks, "KEY_BLOCK", 2)
        monkeypatch.setattr(blocks, "MIN_QUERY_BLOCK", 2)
        monkeypatch.setattr(blocks, "THREAD_BLOCK_BYTES", 1)
        monkeypatch.setattr(blocks, "ADDED_BLOCK_BYTES", 1)
    case = make_case(
        maps=2, map_index=(1, 0, 1), queries=3, keys=4, head_dim=2, value_dim=3, dtype=torch.float64, bias=bias
    )
    leaves = [t.requires_grad_() for t in (case.query, case.key, case.value, case.weight, case.bias) if t is not None]
    rest = (list(case.map_index), case.factor, name)

    def every_op(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
        out, logsumexp = APPLY.apply(query, key, value, bias, *rest)
        # Finite differences move the known log-sum-exp along with query and key, as its gradient rule says.
        known = logsumexp.detach()
        return (
            out,
            logsumexp,
            APPLY.replay(query, key, value, bias, known, *rest),
            APPLY.adjoint(query, key, weight, bias, known, *rest),
        )

    assert torch.autograd.gradcheck(every_op, leaves, fast_mode=True)


def test_compiles_into_one_graph_with_gradients(backend) -> None:
    case = make_case(map_index=(0, 0), heads=1, queries=5, keys=6, head_dim=8, device=backend.device)
    leaves = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return shared_attention(query, key, value, [0, 0], backend=backend.name)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a cache that Dynamo ignores
        warnings.filterwarnings("ignore", "Conversion of an array with ndim")  # Triton's interpreter, by NumPy
        out = compiled(*leaves)
        grads = torch.autograd.grad(out, leaves, case.weight)
    assert_matches(case, out=out, grad_query=grads[0], grad_key=grads[1], grad_value=grads[2])


def test_the_operator_compiles_into_one_graph(backend) -> None:
    case = make_case(heads=1, queries=5, keys=6, head_dim=8, device=backend.device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        operator = AttentionMap(query, key, backend=backend.name)
        return operator.matmul(value), operator.logsumexp, operator.T.matmul(weight)

    out, logsumexp, adjoint = compiled(case.query, case.key, case.value, case.weight)
    assert_matches(case, out=out, logsumexp=logsumexp, adjoint=adjoint)


def test_compiles_with_dynamic_shapes(backend) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return shared_attention(query, key, value, [0, 0], backend=backend.name)

    for tokens in (5, 9):
        case = make_case(map_index=(0, 0), heads=1, queries=tokens, keys=tokens, head_dim=8, device=backend.device)
        assert_matches(case, out=compiled(case.query, case.key, case.value))


def test_vmap_is_refused_with_the_way_out() -> None:
    case = make_case(maps=2)
    stacked = [tensor.unsqueeze(1) for tensor in (case.query, case.key, case.value)]
    with pytest.raises(NotImplementedError, match=r"vmap cannot map.*Fold the mapped axis into the batch"):
        torch.vmap(lambda query, key, value: AttentionMap(query, key) @ value)(*stacked)


@pytest.mark.parametrize("place", ["query", "key", "value", "bias", "weight"])
def test_forward_mode_is_refused_instead_of_losing_tangents(place: str) -> None:
    case = make_case(bias=(0, 0, 0, 1), row_weight=(0, 0, 1))
    tensors = {"query": case.query, "key": case.key, "value": case.value, "bias": case.bias, "weight": case.row_weight}

    def attend(tensor: Tensor) -> Tensor:
        return shared_attention(**{**tensors, place: tensor}, map_index=[0])

    with pytest.raises(NotImplementedError, match=rf"{place} has a forward-mode tangent.*torch\.autograd\.grad"):
        torch.func.jvp(attend, (tensors[place],), (torch.ones_like(tensors[place]),))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=rf"{place} has a forward-mode tangent"):
            attend(forward_ad.make_dual(tensors[place], torch.ones_like(tensors[place])))
        assert attend(tensors[place]).isfinite().all()  # nothing else is refused there


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vjp, torch.func.jacrev])
def test_transforms_of_torch_func_are_refused_with_what_works_instead(transform, backend) -> None:
    case = make_case(heads=1, queries=5, keys=6, head_dim=8, device=backend.device)

    def total(query: Tensor) -> Tensor:
        return (AttentionMap(query, case.key, backend=backend.name) @ case.value).sum()

    with pytest.raises(NotImplementedError, match=r"query is being differentiated.*use torch\.autograd\.grad"):
        transform(total, case.query) if transform is torch.func.vjp else transform(total)(case.query)


def test_second_derivatives_are_refused(backend) -> None:
    case = make_case(heads=1, queries=5, keys=6, head_dim=8, device=backend.device)
    query = case.query.requires_grad_()
    out = AttentionMap(query, case.key, backend=backend.name) @ case.value
    (grad,) = torch.autograd.grad(out, query, case.weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()


def test_the_statistics_of_a_map_that_no_row_names_are_nan(backend) -> None:
    case = make_case(maps=2, map_index=(1,), heads=1, queries=5, keys=6, head_dim=8, device=backend.device)
    _, logsumexp = APPLY.apply(case.query, case.key, case.value, None, [1], case.factor, backend.name)
    assert logsumexp[0].isnan().all()
    assert logsumexp[1].isfinite().all()


def test_gradients_of_a_map_that_no_row_names_are_zero(backend) -> None:
    case = make_case(maps=2, map_index=(1,), heads=1, queries=5, keys=6, head_dim=8, device=backend.device)
    leaves = [case.query.requires_grad_(), case.key.requires_grad_()]
    out = shared_attention(*leaves, case.value, [1], backend=backend.name)
    for grad in torch.autograd.grad(out, leaves, case.weight):
        assert (grad[0] == 0).all()
        assert (grad[1] != 0).any()


def test_a_batch_of_no_rows(backend) -> None:
    case = make_case(heads=1, queries=5, keys=6, head_dim=8, device=backend.device)
    query = case.query.requires_grad_()
    for _ in range(2):  # the second time what is launched, nothing, is known
        out = shared_attention(query, case.key, case.value[:0], [], backend=backend.name)
        assert out.shape == (0, 1, 5, 8)
        assert (torch.autograd.grad(out.sum(), query)[0] == 0).all()


def test_autocast_changes_nothing(backend) -> None:
    case = make_case(heads=1, queries=33, keys=33, head_dim=40, bias=(0, 0, 0, 1), device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        out = AttentionMap(case.query, case.key, bias=case.bias, backend=backend.name) @ case.value
    assert_matches(case, out=out)


def test_autocast_changes_no_view_and_no_combination(backend) -> None:
    case = make_case(heads=1, queries=33, keys=33, head_dim=40, device=backend.device, amplitude=3.0)
    mixing = torch.randn(33, 5, device=backend.device)

    def everything() -> list[Tensor]:
        operator = AttentionMap(case.query, case.key, backend=backend.name)
        mixed = operator.mix(mixing)
        views = [operator.rows([3]), operator.columns([1]), operator.pooled((3, 11), (11, 3), 2), operator.dense()]
        return [*views, mixed @ case.value[:, :, :5], mixed.T @ case.weight, mixed.dense()]

    expected = everything()
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        results = everything()
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda A, B, value, weight: A @ value,
        lambda A, B, value, weight: A.T @ weight,
        lambda A, B, value, weight: (0.5 * A + B) @ value,
        lambda A, B, value, weight: blend(weight[0, 0, :, 0], A, B) @ value,
        lambda A, B, value, weight: torch.matmul(A - B, value),
    ],
    ids=["product", "transpose", "sum", "blend", "function"],
)
def test_operators_compile_into_one_graph(call) -> None:
    case = make_case(heads=1, queries=5, keys=6, head_dim=8)

    def product(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        return call(AttentionMap(query, key), AttentionMap(2.0 * query, key), value, weight)

    torch.compiler.reset()
    tensors = case.query, case.key, case.value, case.weight
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), product(*tensors), rtol=0, atol=0)


def test_a_product_that_tracing_cannot_tell_from_another_is_refused() -> None:
    case = make_case(heads=1, queries=8, keys=6, head_dim=8)
    compiled = torch.compile(lambda q, k, v: AttentionMap(q, k) @ v, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"write A\.matmul\(value\)"):
        compiled(case.query, case.key, case.value)
    with pytest.raises(TypeError, match="unsupported operand"):
        case.value @ AttentionMap(case.query, case.key)


@pytest.mark.parametrize("shape", [(5,), (2, 1)])
def test_weights_times_a_map_compile_into_one_graph(shape: tuple[int, ...]) -> None:
    case = make_case(heads=2, queries=5, keys=6, head_dim=8)
    torch.compiler.reset()
    weighted = lambda weight, query, key, value: (weight * AttentionMap(query, key)).matmul(value)  # noqa: E731
    tensors = torch.rand(shape), case.query, case.key, case.value
    compiled = torch.compile(weighted, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), weighted(*tensors), rtol=0, atol=0)


def test_weights_that_tracing_cannot_tell_from_those_of_columns_break_the_graph() -> None:
    case = make_case(heads=1, queries=6, keys=6, head_dim=8)
    weighted = lambda weight, query, key, value: (weight * AttentionMap(query, key)).matmul(value)  # noqa: E731
    tensors = torch.rand(6), case.query, case.key, case.value
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(weighted, backend="eager")(*tensors), weighted(*tensors), rtol=0, atol=0)
    columns = torch.compile(lambda weight, query, key: AttentionMap(query, key) * weight, backend="eager")
    with pytest.raises(TypeError, match="does not say what it weights"):
        columns(*tensors[:3])
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"A \* weight apart: write A\.scale_rows\(w\)"):
        torch.compile(weighted, backend="eager", fullgraph=True)(*tensors)


def test_a_product_into_a_tensor_that_is_there_is_refused() -> None:
    case = make_case(heads=1, queries=8, keys=6, head_dim=8)
    operator, out = AttentionMap(case.query, case.key), torch.full_like(case.weight, 7.0)
    with pytest.raises(TypeError, match=r"takes no out=.*out\.copy_"):
        torch.matmul(operator, case.value, out=out)
    torch.testing.assert_close(torch.matmul(operator, case.value, out=None), operator @ case.value)


INDUCTOR = {
    "product": lambda A, value, weight: A.matmul(value),
    "transpose": lambda A, value, weight: A.T.matmul(weight),
    "logsumexp": lambda A, value, weight: A.logsumexp,
    "blend": lambda A, value, weight: blend(weight[0, 0, :, 0], A, 0.5 * A).matmul(value),
    "pooled": lambda A, value, weight: A.pooled((3, 4), (2, 5), 2),
    "rows": lambda A, value, weight: A.rows([1, 2]),
    "joined": lambda A, value, weight: join([A.keys(0, 4), A.keys(4)]).matmul(value),
    "joined transpose": lambda A, value, weight: join([A.keys(0, 4), A.keys(4)]).T.matmul(weight),
}


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", INDUCTOR)
def test_inductor_compiles_it_with_gradients(name: str) -> None:
    case = make_case(heads=2, queries=12, keys=10, head_dim=8)
    leaves = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value, case.weight)]

    def call(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        return INDUCTOR[name](AttentionMap(query, key), value, weight)

    torch.compiler.reset()
    expected = call(*leaves)
    result = torch.compile(call, fullgraph=True)(*leaves)
    torch.testing.assert_close(result, expected)
    noise = torch.randn_like(expected)
    grads, wanted = (torch.autograd.grad(out, leaves[:2], noise) for out in (result, expected))
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize(
    "index", few({"one": 2, "some": [0, 3, 4], "back": [-1, -2], "many": list(range(0, 130, 2))}, "one", "some")
)
def test_rows_and_columns_compile_into_one_graph(index, backend) -> None:
    case = make_case(heads=1, queries=131, keys=131, head_dim=8, device=backend.device)

    def views(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        operator = AttentionMap(query, key, backend=backend.name)
        return operator.rows(index), operator.columns(index)

    torch.compiler.reset()  # the other cases' compilations of this function count towards its limit
    compiled = torch.compile(views, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.query, case.key), views(case.query, case.key))


def test_rows_by_a_tensor_compile_into_one_graph() -> None:
    case = make_case(heads=1, queries=9, keys=9, head_dim=8)
    rows = lambda query, key, index: AttentionMap(query, key).rows(index)  # noqa: E731
    compiled = torch.compile(rows, fullgraph=True, backend="aot_eager")
    index = torch.tensor([4, -1])
    torch.testing.assert_close(compiled(case.query, case.key, index), rows(case.query, case.key, index))


def test_outputs_have_the_layout_that_merging_heads_wants() -> None:
    like = torch.empty(1)
    assert ops.empty_heads(like, 2, 3, 4, 5).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("learnt", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize(
    "product",
    [
        lambda A, value, weight: A @ value,
        lambda A, value, weight: A.T @ weight,
        lambda A, value, weight: shared_attention(A.query, A.key, value, [0], weight=0.5),
        lambda A, value, weight: join([A.keys(0, 2), A.keys(2)]) @ value,
        lambda A, value, weight: join([A.keys(0, 2), A.keys(2)]).T @ weight,
        lambda A, value, weight: stack([A, A]) @ value,
        lambda A, value, weight: (A @ (value, value))[1],
        lambda A, value, weight: (A + A).rows([0, 1]),
        lambda A, value, weight: A.scale_columns(0.5 * A.column_sums()).block(keys=(1, 3)).rows([0, 1]),
    ],
    ids=["product", "transpose", "shared", "joined", "joined transpose", "stacked", "one of two", "rows", "of a block"],
)
def test_products_can_be_changed_in_place(product, learnt: bool) -> None:
    case = make_case(heads=2, queries=5, keys=6, head_dim=8)
    with torch.set_grad_enabled(learnt):
        out = product(AttentionMap(case.query, case.key), case.value.requires_grad_(), case.weight.requires_grad_())
    residual = torch.randn(1).requires_grad_()
    expected = out.detach() + residual.detach()
    out += residual
    out[:, :, 0] = 0.0
    assert torch.equal(out[:, :, 1:], expected[:, :, 1:])


def test_one_of_several_products_can_be_changed_in_place() -> None:
    case = make_case(heads=2, queries=5, keys=6, head_dim=8)
    values = case.value.requires_grad_(), 2.0 * case.value
    first, second = AttentionMap(case.query, case.key) @ values
    expected = first.detach().clone(), second.detach() + 1.0
    second += 1.0
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


@pytest.mark.parametrize("known", [False, True])
def test_gradients_of_values_alone_keep_no_product_and_sum_none(known: bool, monkeypatch) -> None:
    case = make_case(heads=2, queries=5, keys=6, head_dim=8)
    monkeypatch.setattr(gradient_rules, "gather_delta", lambda *args: pytest.fail("a map without gradients needs none"))
    operator, kept = AttentionMap(case.query, case.key), []
    if known:
        _ = operator.logsumexp
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = operator @ case.value.requires_grad_()
        transposed = operator.T @ case.weight.requires_grad_()
    assert all(tensor.data_ptr() != out.data_ptr() for tensor in kept)
    out *= 2.0
    noise = torch.randn_like(case.weight)
    (grad,) = torch.autograd.grad(out, case.value, noise)
    torch.testing.assert_close(grad, 2.0 * operator.dense().mT @ noise)
    noise = torch.randn_like(transposed)
    (grad,) = torch.autograd.grad(transposed, case.weight, noise)
    torch.testing.assert_close(grad, operator.dense() @ noise)
