"""Joined maps and ranges: the contract of every backend, what is computed, compiled and refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpe_kernels import AttentionMap, beside, blend, concatenate, join, stack
from fpe_kernels.backends import chunked
from fpe_kernels.testing import make, make_case
from tests.support.contract import FLOATS, cut_small_blocks
from tests.support.contract_joins import JoinContract


# Only the tests that the joins add: those of products run in test_backends.py.
def own_tests(contract: type) -> type:
    """``contract`` with the tests of the classes that it inherits from switched off."""
    inherited = {name for base in contract.__mro__[1:] for name in vars(base) if name.startswith("test_")}
    hidden = {name: None for name in inherited if name not in vars(JoinContract)}
    return type(contract.__name__, (contract,), hidden)


Joins = own_tests(JoinContract)


class TestReference(Joins):
    backend = "reference"
    dtypes = (torch.float64, torch.float32)


class TestTorch(Joins):
    backend = "torch"
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class TestTorchInSmallBlocks(TestTorch):
    """Here the shapes of these tests take many blocks, and no fused call."""

    @pytest.fixture(autouse=True)
    def _small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cut_small_blocks(monkeypatch)


class TestTriton(Joins):
    """Through the interpreter on a machine without a CUDA device, compiled on one with."""

    backend = "triton"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = tuple(dtype for dtype in (torch.float16, *FLOATS[1:3]))

    @pytest.fixture(autouse=True)
    def _needs_triton(self) -> None:
        pytest.importorskip("triton")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...]]]:
    """Keys and map_index of every product of the torch backend."""
    seen: list[tuple[int, tuple[int, ...]]] = []
    original = chunked.apply

    def counted(maps, *args):
        seen.append((maps.key.shape[2], maps.map_index))
        return original(maps, *args)

    monkeypatch.setattr(chunked, "apply", counted)
    return seen


def parts(rows: int = 3) -> tuple[AttentionMap, AttentionMap, Tensor]:
    """An image part of one map, the text parts of ``rows`` rows, and values of all of their keys."""
    case = make_case(maps=rows, queries=9, keys=17)
    image = AttentionMap(case.query[:1], case.key[:1, :, 7:])
    text = AttentionMap(case.query[:1].expand(rows, -1, -1, -1), case.key[:, :, :7])
    return text, image, case.value


def test_a_shared_part_is_one_pass_for_all_rows(calls) -> None:
    text, image, value = parts()
    joined = join([text, image.take([0, 0, 0])])
    assert calls == []  # lazy
    joined @ value
    assert calls == [(10, (0, 0, 0)), (7, (0, 1, 2))]  # the shared part first, the private one takes it up


def test_rows_of_other_maps_beside_a_shared_one(calls) -> None:
    """A guided batch: an unconditional row with maps of its own, then rows that share the source's image part."""
    text, image, value = parts()
    own = AttentionMap(make((1, 2, 9, 16), 40), make((1, 2, 10, 16), 41))
    joined = join([text, concatenate([image, own, image])])
    out = joined @ value
    assert calls == [(10, (0, 0)), (10, (0,)), (7, (0, 1, 2))]
    expected = [join([text[row], part]) @ value[row : row + 1] for row, part in enumerate((image, own, image))]
    torch.testing.assert_close(out, torch.cat(expected))
    torch.testing.assert_close(joined.T @ out, joined.dense().transpose(-1, -2) @ out)


def test_a_blend_with_a_joined_map_computes_each_part_once(calls) -> None:
    text, image, value = parts()
    joined, other = join([text, image.take([0, 0, 0])]), AttentionMap(make((3, 2, 9, 16), 50), make((3, 2, 17, 16), 51))
    mixed = blend(torch.linspace(0, 1, 9), joined.scale_columns(torch.arange(17.0)), other) + 0.5 * joined
    out = mixed @ value
    assert sorted(calls) == [(7, (0, 1, 2) * 2), (10, (0,) * 6), (17, (0, 1, 2))]
    torch.testing.assert_close(out, mixed.dense() @ value)


def test_entries_of_a_block_read_the_keys_of_the_block(calls) -> None:
    case = make_case(queries=9, keys=17)
    operator = AttentionMap(case.query, case.key)
    operator @ case.value
    calls.clear()
    out = operator.block(keys=(3, 8)) @ case.value[:, :, 3:8]
    assert calls == [(5, (0,))]
    torch.testing.assert_close(out, operator.dense()[..., 3:8] @ case.value[:, :, 3:8])


def test_ranges_keep_what_is_known_and_copy_nothing(calls) -> None:
    case = make_case(queries=9, keys=17)
    operator = AttentionMap(case.query, case.key)
    operator @ case.value
    calls.clear()
    part = operator.queries(2, 5)
    assert torch.equal(part.logsumexp, operator.logsumexp[:, :, 2:5])
    assert calls == []
    assert part.query.data_ptr() == operator.query[:, :, 2:5].data_ptr()
    assert operator.keys(3).key.data_ptr() == operator.key[:, :, 3:].data_ptr()
    case.query.mul_(2.0)  # in place: the range's statistics are out of date, too
    torch.testing.assert_close(part.logsumexp, AttentionMap(case.query[:, :, 2:5], case.key).logsumexp)


def test_what_joined_and_stacked_maps_say_of_themselves() -> None:
    text, image, _ = parts()
    joined = join([text, image.take([0, 0, 0])])
    assert repr(joined) == "JoinedMap(shape=(3, 2, 9, 17), dtype=torch.float32, device='cpu', keys=[7, 10])"
    assert joined.nbytes == text.nbytes + image.nbytes
    stacked = stack([joined, joined.queries(2, 5)])
    assert repr(stacked) == "StackedMap(shape=(3, 2, 12, 17), dtype=torch.float32, parts=2)"
    assert not joined.requires_grad
    assert join([text, AttentionMap(text.query.detach().requires_grad_(), text.key)]).requires_grad


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck_of_joined_stacked_and_cut_maps(name: str) -> None:
    case = make_case(
        maps=2, queries=4, keys=6, heads=2, head_dim=2, value_dim=2, dtype=torch.float64, bias=(0, 0, 1, 1)
    )
    shared = make((1, 2, 5, 2), 9, torch.float64)
    leaves = [t.requires_grad_() for t in (case.query, case.key, case.value, case.weight, case.bias, shared)]

    def everything(query, key, value, weight, bias, shared) -> tuple[Tensor, ...]:
        own = AttentionMap(query, key, bias=bias, backend=name)
        common = AttentionMap(query[:1], shared, backend=name, key_lengths=[3]).take([0, 0])
        joined = join([own.keys(0, 2), own.keys(2), common])
        stacked = stack([joined.queries(0, 1), beside([joined.block((1, 4), (0, 3)), joined.block((1, 4), (3, 11))])])
        values = torch.cat([value, value[:, :, :5]], dim=2)
        return joined @ values, joined.T @ weight, joined.logsumexp, stacked @ values, stacked.T @ weight

    assert torch.autograd.gradcheck(everything, leaves, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"key_lengths": (3, 5)}, {"heads": 4, "key_heads": 2, "value_heads": 2}], ids=str)
def test_opcheck_with_key_lengths_grouped_heads_and_wide_results(options: dict, backend) -> None:
    case = make_case(
        **{"maps": 2, "heads": 1, "queries": 5, "keys": 6, "head_dim": 8, "device": backend.device, **options}
    )
    ops = torch.ops.fpe_kernels
    rest, lengths = ([0, 1], case.factor, backend.name), None if case.key_lengths is None else list(case.key_lengths)
    query, key, value, weight = (t.requires_grad_() for t in (case.query, case.key, case.value, case.weight))
    _, known = ops.apply(query.detach(), key.detach(), value.detach(), None, *rest, None, lengths)
    factors = (query.detach(), key.detach(), weight.detach(), value.detach(), torch.zeros_like(known), None, known)
    for op, arguments in (
        (ops.apply, (query, key, value, None, *rest, None, lengths, True)),
        (ops.replay, (query, key, value, None, known, *rest, None, lengths, True)),
        (ops.adjoint, (query, key, weight, None, known, *rest, lengths, True)),
        (ops.merge, (query, key, value, None, known, *rest, weight.float(), known, None, lengths)),
        (ops.score_gradient, (*factors, *rest, lengths)),
    ):
        checks = ["test_schema", "test_faketensor"]
        checks += ["test_autograd_registration"] if op in (ops.apply, ops.replay, ops.adjoint) else []
        torch.library.opcheck(op.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "reference", "triton")],
    indirect=True,
)
def test_joined_maps_compile_into_one_graph_with_gradients(backend) -> None:
    case = make_case(maps=2, heads=2, queries=5, keys=9, head_dim=8, device=backend.device)
    leaves = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]

    def edited(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        image = AttentionMap(query[:1], key[:1, :, 4:], backend=backend.name).take([0, 0])
        text = AttentionMap(query[:1].expand(2, -1, -1, -1), key[:, :, :4], backend=backend.name, key_lengths=[4, 2])
        joined = join([text, image])
        rows = stack([joined.queries(0, 2), joined.block((2, 5))])
        return joined.matmul(value), rows.matmul(value), joined.T.matmul(value[:, :, :5]), joined.columns([1, 6])

    torch.compiler.reset()
    expected = edited(*leaves)
    found = torch.compile(edited, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(sum(out.square().sum() for out in outs), leaves) for outs in (found, expected)]
    torch.testing.assert_close(*grads)


TEXT, IMAGE, VALUE = parts()
REFUSED = {
    "no maps to join": (lambda: join([]), ValueError, r"join\(\[\]\) has no map"),
    "a map, whose rows are maps": (
        lambda: join(TEXT),
        TypeError,
        r"join takes a list of maps, got AttentionMap: ",
    ),
    "a map beside nothing": (lambda: beside(TEXT), TypeError, r"beside takes a list of maps, got AttentionMap"),
    "a map on nothing": (lambda: stack(TEXT), TypeError, r"stack takes a list of maps, got AttentionMap"),
    "maps one by one": (lambda: concatenate(iter([TEXT])), TypeError, r"concatenate takes a list of maps, got list_it"),
    "a tensor to join": (lambda: join([TEXT, VALUE]), TypeError, r"join takes maps .*got Tensor"),
    "other batch rows": (lambda: join([TEXT, IMAGE]), ValueError, r"agree in \[B, H, N\]: got \[3, .*A\.take\(index\)"),
    "other queries": (lambda: join([TEXT, TEXT.queries(1, 3)]), ValueError, r"agree in \[B, H, N\].*A\.queries"),
    "a sum to join": (
        lambda: join([TEXT, TEXT + TEXT]),
        TypeError,
        r"join normalises .*one softmax in each row.*got Combination",
    ),
    "a weighted map to join": (
        lambda: join([TEXT, 0.5 * TEXT]),
        TypeError,
        r"one softmax in each row.*Weight, mix, stack",
    ),
    "a block to join": (lambda: join([TEXT, TEXT.block(keys=(0, 3))]), TypeError, r"one softmax in each row"),
    "another dtype to join": (
        lambda: join([TEXT, AttentionMap(TEXT.query.double(), TEXT.key.double())]),
        TypeError,
        r"the second map must have the dtype",
    ),
    "other keys to stack": (
        lambda: stack([TEXT, IMAGE.take([0, 0, 0])]),
        ValueError,
        r"agree in \[B, H\] and M.*A\.mix",
    ),
    "other rows beside": (lambda: beside([TEXT, TEXT.queries(0, 3)]), ValueError, r"agree in \[B, H, N\]"),
    "keys of a sum": (lambda: (TEXT + TEXT).keys(0, 3), TypeError, r"use block\(keys=\).*got Combination"),
    "a range past the end": (lambda: TEXT.queries(3, 12), IndexError, r"query tokens must have 0 <= start < stop <= 9"),
    "an empty range of queries": (lambda: TEXT.queries(3, 3), IndexError, r"query tokens must have 0 <= start < stop"),
    "a range of text": (lambda: TEXT.keys("a", 3), TypeError, r"range of key tokens is two ints"),
    "keys past the end": (lambda: TEXT.block(keys=(3, 8)), IndexError, r"key tokens must have 0 <= start <= stop <= 7"),
    "a value of other tokens": (lambda: join([TEXT, TEXT]) @ VALUE, ValueError, r"value must have 14 tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def test_no_column_of_a_map_without_keys() -> None:
    query = torch.randn(1, 2, 3, 4)
    assert join([AttentionMap(query, query)] * 2).keys(2, 2).columns([]).shape == (1, 2, 3, 0)


@pytest.mark.parametrize("given", [3, slice(0, 2), (0, 1, 2)])
def test_ranges_of_a_block_are_pairs(given: object) -> None:
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(TypeError, match=r"a range of (query|key) tokens is two ints, start and stop, got"):
        AttentionMap(query, query).block(given)
    with pytest.raises(TypeError, match="a range of key tokens is two ints"):
        AttentionMap(query, query).block(keys=given)
