"""Row weights of products: what is left out, which dtypes they may have, how the op declares them, what is refused."""

from __future__ import annotations

import pytest
import torch

from fpe_kernels import AttentionMap, shared_attention
from fpe_kernels.testing import Case, assert_matches, assert_within_budget, make_case, score_magnitude

OPS = torch.ops.fpe_kernels
NAN = float("nan")


@pytest.fixture
def triton_device() -> str:
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


def attend(case: Case, backend: str, **options) -> torch.Tensor:
    return shared_attention(
        case.query, case.key, case.value, case.map_index, scale=case.scale, bias=case.bias, backend=backend, **options
    )


def test_tiles_without_a_weight_read_no_key(triton_device: str) -> None:
    case = make_case(map_index=(0, 0), heads=1, queries=300, keys=9, head_dim=8, device=triton_device)
    weight = torch.zeros(2, 1, 300, device=triton_device)
    weight[1, :, 290:] = 1.0
    case.query[:, :, :256] = NAN
    out = attend(case, "triton", weight=weight)
    assert (out[:, :, :256] == 0).all()
    case.query[:, :, :256] = 0.0
    torch.testing.assert_close(out, weight.unsqueeze(-1) * attend(case, "reference"))


def test_statistics_of_rows_left_out_say_so(triton_device: str) -> None:
    case = make_case(heads=1, queries=300, keys=9, head_dim=8, device=triton_device)
    weight = torch.ones(1, 1, 300, device=triton_device)
    weight[..., :256] = 0.0
    rest = ([0], case.factor, "triton", weight)
    _, logsumexp = OPS.apply(case.query, case.key, case.value, None, *rest)
    assert logsumexp[..., :256].isposinf().all()
    torch.testing.assert_close(logsumexp[..., 256:], case.exact["logsumexp"][..., 256:].float())


def test_a_map_keeps_no_statistics_of_a_weighted_product(backend) -> None:
    case = make_case(heads=1, queries=300, keys=9, head_dim=8, device=backend.device)
    operator = AttentionMap(case.query, case.key, backend=backend.name)
    weight = torch.zeros(300, device=backend.device)
    assert (operator.scale_rows(weight) @ case.value == 0).all()
    assert_matches(case, out=operator @ case.value, logsumexp=operator.logsumexp)
    assert (operator.scale_rows(weight) @ case.value == 0).all()  # and from known statistics


def test_half_precision_maps_take_float32_weights(backend) -> None:
    case = make_case(
        map_index=(0, 0), heads=2, queries=9, keys=17, dtype=torch.float16, row_weight=(1, 1, 1), device=backend.device
    )
    weight = case.row_weight.float().requires_grad_()
    out = attend(case, backend.name, weight=weight)
    assert_matches(case, out=out)
    (grad,) = torch.autograd.grad(out, weight, case.weight)
    assert grad.dtype == torch.float32
    assert_matches(case, grad_row_weight=grad)


def test_products_of_weights_of_half_precision_are_wide(backend) -> None:
    case = make_case(heads=1, queries=9, keys=17, dtype=torch.float16, device=backend.device)
    A = AttentionMap(case.query, case.key, backend=backend.name)
    far = torch.full((9,), 300.0, dtype=torch.float16, device=backend.device)
    for edited in (A.scale_rows(far).scale_rows(far) * (1.0 / 90_000.0), (A * 1e-7).scale_rows(far) * (1e7 / 300.0)):
        assert_matches(case, out=edited @ case.value, adjoint=edited.T @ case.weight)


def test_numbers_of_the_batch_rows(backend) -> None:
    case = make_case(map_index=(0, 0, 0), heads=1, queries=9, keys=17, device=backend.device)
    out = attend(case, backend.name, weight=[1.0, 0.0, -2])
    numbers = torch.tensor([1.0, 0.0, -2.0], device=backend.device).view(3, 1, 1, 1)
    exact, plain = (numbers * results["out"] for results in (case.exact, case.plain))
    assert_within_budget(out, plain, exact, case.query.dtype, 2 * case.magnitude["out"], score_magnitude(case))
    torch.testing.assert_close(attend(case, backend.name, weight=0.5), 0.5 * attend(case, backend.name))


@pytest.mark.parametrize("weight", [0.5, []], ids=str)
def test_numbers_of_no_batch_row(weight: float | list[float], backend) -> None:
    case = make_case(heads=1, queries=5, keys=6, head_dim=8, device=backend.device)
    out = shared_attention(case.query, case.key, case.value[:0], [], weight=weight, backend=backend.name)
    assert out.shape == (0, 1, 5, 8)


@pytest.mark.parametrize("name", ["apply", "replay"])
def test_opcheck(name: str, backend) -> None:
    case = make_case(
        map_index=(0, 0), heads=1, queries=5, keys=6, head_dim=8, row_weight=(1, 0, 1), device=backend.device
    )
    query, key, value, weight = (
        tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value, case.row_weight)
    )
    known = (case.exact["logsumexp"].float(),) if name == "replay" else ()
    arguments = (query, key, value, None, *known, [0, 0], case.factor, backend.name, weight)
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if backend.name == "torch":
        checks += ["test_aot_dispatch_dynamic"]
    torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=checks)


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("known", [False, True])
def test_gradcheck(name: str, known: bool) -> None:
    case = make_case(
        maps=2, map_index=(1, 0, 1), queries=3, keys=4, head_dim=2, dtype=torch.float64, row_weight=(1, 1, 1)
    )
    leaves = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value, case.row_weight)]

    def weighted(query, key, value, weight):
        rest = (list(case.map_index), case.factor, name)
        if not known:
            return OPS.apply(query, key, value, None, *rest, weight)[0]
        logsumexp = OPS.apply(query, key, value, None, *rest)[1].detach()
        return OPS.replay(query, key, value, None, logsumexp, *rest, weight)

    assert torch.autograd.gradcheck(weighted, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_second_derivatives_in_value_and_weights_know_rows_of_weight_zero(name: str) -> None:
    case = make_case(map_index=(0, 0), queries=3, keys=4, head_dim=2, dtype=torch.float64, row_weight=(1, 1, 1))
    weight = case.row_weight.clone()
    weight[:, :, 1:] = 0.0
    leaves = case.value.requires_grad_(), weight.requires_grad_()

    def weighted(value, weight):
        return shared_attention(case.query, case.key, value, case.map_index, weight=weight, backend=name)

    assert torch.autograd.gradgradcheck(weighted, leaves)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_compiles_into_one_graph_with_gradients(name: str) -> None:
    case = make_case(map_index=(0, 0), heads=1, queries=5, keys=6, head_dim=8, row_weight=(1, 0, 1))
    leaves = [tensor.requires_grad_() for tensor in (case.query, case.value, case.row_weight)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(query, value, weight):
        return shared_attention(query, case.key, value, [0, 0], weight=weight, backend=name)

    out = compiled(*leaves)
    grads = torch.autograd.grad(out, leaves, case.weight)
    assert_matches(case, out=out, grad_query=grads[0], grad_value=grads[1], grad_row_weight=grads[2])


Q, K, V = torch.randn(1, 3, 5, 8), torch.randn(1, 3, 7, 8), torch.randn(2, 3, 7, 4)
REFUSED = {
    "too few numbers": ([1.0], ValueError, r"one number for each of the 2 batch rows, got 1"),
    "a number that is none": ([1.0, "x"], TypeError, r"weight\[1\] must be a number, got 'x'"),
    "of the keys": (torch.ones(7), ValueError, r"weight must broadcast to \[B, H, N\] = \[2, 3, 5\], got \[7\]"),
    "with columns": (torch.ones(2, 3, 5, 1), ValueError, r"weight must broadcast to \[B, H, N\]"),
    "integers": (torch.ones(5).long(), TypeError, r"weight must be floating point, got torch\.int64"),
    "half beside float32": (torch.ones(5).half(), TypeError, r"dtype of query or of its statistics.*weight\.to\("),
    "elsewhere": (torch.ones(5, device="meta"), ValueError, r"weight must be on the device of query"),
    "text": ("half", TypeError, r"weight must be a torch\.Tensor that broadcasts to \[B, H, N\], got str"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    weight, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        shared_attention(Q, K, V, [0, 0], weight=weight)
