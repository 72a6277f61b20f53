"""Sums, blends and gathers of maps: how often a map is computed, the laws of the algebra, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fpe_kernels import AttentionMap, LinearMap, blend, concatenate, join, known_columns
from tests.support.composed_edits import DIM, HEADS, PIXELS, Edits, Tensors, pair


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Name and map_index of every product and adjoint of the torch backend."""
    from fpe_kernels.backends import chunked

    seen: list[tuple[str, tuple[int, ...]]] = []

    def count(name: str) -> None:
        original = getattr(chunked, name)

        def counted(maps, *args):
            seen.append((name, maps.map_index))
            return original(maps, *args)

        monkeypatch.setattr(chunked, name, counted)

    count("apply")
    count("adjoint")
    return seen


def test_one_pass_over_a_source_whatever_is_made_of_it(calls) -> None:
    Edits.PromptToPromptWholeBatch().lazy(Tensors.make(torch.float32), AttentionMap)
    assert calls == [("apply", (0, 0, 0)), ("apply", (0, 1))]


def test_a_gather_computes_a_map_once(calls) -> None:
    _, target = pair()
    value = torch.randn(3, HEADS, PIXELS, DIM)
    out = target.take([1, 0, 1]) @ value
    assert calls == [("apply", (1, 0, 1))]
    torch.testing.assert_close(out, target.dense()[[1, 0, 1]] @ value)


def test_terms_of_one_map_are_one_call_in_the_transpose_too(calls) -> None:
    source, _ = pair()
    weight = torch.randn(1, HEADS, PIXELS, 2)
    assert source.logsumexp.isfinite().all()
    calls.clear()
    (source.scale_rows(torch.rand(PIXELS)) + source.mix(torch.rand(PIXELS, PIXELS))).T @ weight
    assert calls == [("adjoint", (0, 0))]


def test_a_weight_of_zero_computes_nothing(calls) -> None:
    source, target = pair()
    value = torch.randn(2, HEADS, PIXELS, DIM)
    torch.testing.assert_close(blend(0.0, source.take([0, 0]), target) @ value, target @ value)
    assert {index for _, index in calls} == {(0, 1)}


def test_a_weight_of_zero_has_gradients_of_zero() -> None:
    source, target = pair()
    leaves = [tensor.detach().requires_grad_() for tensor in (source.query, source.key, target.query)]
    first = AttentionMap(leaves[0], leaves[1]).take([0, 0])
    value = torch.randn(2, HEADS, PIXELS, DIM)
    for both in (
        0.0 * first + AttentionMap(leaves[2], target.key),
        blend(0.0, first, AttentionMap(leaves[2], target.key)),
    ):
        out = both @ value
        torch.testing.assert_close(out, target @ value)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        assert not grads[0].any() and not grads[1].any() and grads[2].any()


def test_a_zero_map_is_zero() -> None:
    _, target = pair()
    assert (((0.0 * target) @ torch.randn(2, HEADS, PIXELS, 3)) == 0).all()


def test_the_logsumexp_is_kept_only_where_every_row_was_computed(calls) -> None:
    _, target = pair()
    target.take([1, 1]) @ torch.randn(2, HEADS, PIXELS, DIM)
    assert target.logsumexp.isfinite().all()
    assert [index for _, index in calls] == [(1, 1), (0, 1)]


def same(first: LinearMap, second: LinearMap) -> None:
    torch.testing.assert_close(first.dense(), second.dense())
    assert first.shape == second.shape == torch.Size(first.dense().shape)


def test_the_laws_of_the_algebra() -> None:
    source, target = pair()
    source = source.take([0, 0])
    weight, columns, matrix = torch.rand(PIXELS), torch.rand(PIXELS), torch.rand(PIXELS, 5)
    same(source + target, target + source)
    same((source + target).scale_rows(weight), weight * source + weight * target)
    same((source + target).mix(matrix), source.mix(matrix) + target.mix(matrix))
    same(source.scale_columns(columns), source.mix(torch.diag(columns)))
    same(source.scale_rows(weight).scale_columns(columns), source.scale_columns(columns).scale_rows(weight))
    same((source + target).take([1, 1, 0]), source.take([1, 1, 0]) + target.take([1, 1, 0]))
    same(source.take([1, 0]).take([1, 1]), source.take([0, 0]))
    same(source - target, -(target - source))
    same(source * 2.0, source + source)
    same(source.scale_columns(3), 3 * source)


def test_blocks_of_a_batch_may_be_cut_differently() -> None:
    source, target = pair()
    first = concatenate([source, target])
    second = concatenate([target.scale_rows(2.0), source])
    weight = torch.rand(3, 1, PIXELS)
    value = torch.randn(3, HEADS, PIXELS, 4)
    dense = first.dense() + weight.unsqueeze(-1) * second.dense()
    both = first + second.scale_rows(weight)
    torch.testing.assert_close(both @ value, dense @ value)
    torch.testing.assert_close(both.take([2, 0, 1, 2]).dense(), dense[[2, 0, 1, 2]])
    torch.testing.assert_close(both.T @ value, dense.transpose(-1, -2) @ value)
    torch.testing.assert_close(first.mix(torch.eye(PIXELS)[:, :3]).dense(), first.dense()[..., :3])


def test_views_of_a_combination_are_those_of_its_dense_map() -> None:
    source, target = pair()
    mixed = blend(torch.rand(2, HEADS, PIXELS), source.take([0, 0]), target)
    dense = mixed.dense()
    torch.testing.assert_close(mixed.rows([3, -1]), dense[:, :, [3, -1]])
    torch.testing.assert_close(mixed.columns(4), dense[..., [4]])
    torch.testing.assert_close(mixed.pooled((3, 4), (3, 4), 1)[..., 0, 0], dense.mean((-2, -1)))
    torch.testing.assert_close(mixed.column_sums(), dense.sum(-2))
    with pytest.raises(ValueError, match=r"takes 2,304 bytes, more than max_bytes=10"):
        mixed.dense(max_bytes=10)


def test_a_tuple_of_operands_is_one_pass(calls) -> None:
    source, target = pair()
    mixed = 0.5 * source.take([0, 0]) + target
    first, second = torch.randn(2, HEADS, PIXELS, 3), torch.randn(2, HEADS, PIXELS, 5)
    outs = mixed @ (first, second)
    assert len(calls) == 2
    torch.testing.assert_close(outs[0], mixed @ first)
    torch.testing.assert_close(outs[1], mixed @ second)
    backs = mixed.T @ [first, second]
    torch.testing.assert_close(backs[0], mixed.T @ first)
    torch.testing.assert_close(backs[1], mixed.T @ second)


def test_what_a_combination_says_of_itself() -> None:
    source, target = pair()
    mixed = source.take([0, 0]) + target
    assert repr(mixed) == "Combination(shape=(2, 2, 12, 12), dtype=torch.float32, device='cpu', terms=2, maps=2)"
    shared, weight = mixed + target.scale_rows(torch.ones(PIXELS)), 4 * PIXELS
    assert shared.nbytes == mixed.nbytes + weight == source.nbytes + target.nbytes + weight
    assert mixed.mix(torch.ones(PIXELS, 3)).nbytes == mixed.nbytes + 2 * 4 * PIXELS * 3
    assert repr(mixed.T) == repr(mixed) + ".T"
    assert mixed.T.T is mixed
    assert mixed.mix(torch.ones(PIXELS, 3)).T.shape == (2, 2, 3, 12)
    assert (mixed.T.dtype, mixed.T.device) == (mixed.dtype, mixed.device)


S, T = pair()
REFUSED = {
    "another batch": (lambda: S + T, ValueError, r"agree in \[B, H, N, M\]: got \[1, 2, .*A\.take\(index\)"),
    "a number added": (lambda: S + 1.0, TypeError, r"unsupported operand"),
    "another dtype": (lambda: T + AttentionMap(T.query.double(), T.key.double()), TypeError, r"the second map must"),
    "a tensor on the right": (lambda: T * torch.ones(12), TypeError, r"tensor \* A or A\.scale_rows.*A\.scale_columns"),
    "an array on the left": (lambda: np.ones(12, np.float32) * T, TypeError, r"must be a torch\.Tensor .*got ndarray"),
    "too few numbers": (lambda: T.scale_rows([0.5]), ValueError, r"one number for each of the 2 batch rows, got 1"),
    "numbers that are none": (lambda: T.scale_rows(["a", 1]), TypeError, r"weight\[0\] must be a number, got 'a'"),
    "a weight that is text": (lambda: T.scale_rows("a"), TypeError, r"weight must be a torch\.Tensor .*got str"),
    "a weight of truths": (lambda: T.scale_rows(torch.ones(12) > 0), TypeError, r"floating point, got torch\.bool"),
    "a weight of other tokens": (lambda: T.scale_rows(torch.ones(5)), ValueError, r"\[B, H, N\] = \[2, 2, 12\]"),
    "a weight of another dtype": (lambda: T.scale_rows(torch.ones(12).half()), TypeError, r"dtype of query or of its"),
    "a weight elsewhere": (lambda: T.scale_rows(torch.ones(12, device="meta")), ValueError, r"weight must be on the"),
    "column weights of others": (lambda: T.scale_columns(torch.ones(5)), ValueError, r"\[B, H, M\] = \[2, 2, 12\]"),
    "column weights as a list": (lambda: T.scale_columns([1.0] * 12), TypeError, r"must be a torch\.Tensor .*got list"),
    "a matrix that is flat": (lambda: T.mix(torch.ones(12)), TypeError, r"\[M, M'\].*got \[12\]"),
    "a matrix of others": (lambda: T.mix(torch.ones(5, 12)), ValueError, r"12 rows.*stored the other way is M\.T"),
    "a row that is not there": (lambda: T.take([2]), IndexError, r"index\[0\] is 2, but there are 2 map"),
    "no rows": (lambda: T.take([]), ValueError, r"A\.take\(\[\]\) has no batch row"),
    "no maps": (lambda: concatenate([]), ValueError, r"concatenate\(\[\]\) has no map"),
    "a tensor among maps": (lambda: concatenate([T, torch.ones(1)]), TypeError, r"takes maps .*got Tensor"),
    "a blend of products": (
        lambda: blend(0.5, T, torch.ones(1)),
        TypeError,
        r"blend takes maps .*torch's own arithmetic",
    ),
    "a blend of other rows": (lambda: blend(torch.ones(12), S, T), ValueError, r"agree in \[B, H, N, M\]"),
    "maps of other keys": (
        lambda: concatenate([T, T.mix(torch.ones(12, 5))]),
        ValueError,
        r"agree in \[H, N, M\].*A\.mix",
    ),
    "a value of the unmixed map": (
        lambda: T.mix(torch.ones(12, 5)) @ torch.ones(2, 2, 12, 1),
        ValueError,
        r"value must have 5 tokens",
    ),
    "an operand of the wrong side": (
        lambda: T.mix(torch.ones(12, 5)).T @ torch.ones(2, 2, 5, 1),
        ValueError,
        r"weight must agree with the map",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("number", [0.5, np.float32(0.5), Fraction(1, 2)], ids=lambda number: type(number).__name__)
def test_numbers_of_any_kind_weigh_rows_and_columns(number) -> None:
    A, value = AttentionMap(torch.randn(1, 2, 6, 8), torch.randn(1, 2, 7, 8)), torch.randn(1, 2, 7, 8)
    expected = 0.5 * (A @ value)
    for weighted in (A.scale_rows(number), A.scale_columns(number), number * A, A * number):
        torch.testing.assert_close(weighted @ value, expected)


def test_maps_on_the_meta_device_give_shapes() -> None:
    query, key, value = (torch.empty(1, 2, tokens, 8, device="meta") for tokens in (6, 12, 12))
    A, index = AttentionMap(query, key), torch.tensor([1, 2], device="meta")
    columns = known_columns(A.columns(index), index, tokens=12)
    for found, shape in (
        (A.rows([0, -1]), (1, 2, 2, 12)),
        (A.rows(index), (1, 2, 2, 12)),
        (A.pooled((2, 3), (3, 4), 2), (1, 2, 4, 4)),
        (A.mix(torch.empty(12, 5, device="meta")).dense(), (1, 2, 6, 5)),
        ((columns + A.scale_columns(0.5)) @ value, (1, 2, 6, 8)),
        (join([A, A]).T @ query, (1, 2, 24, 8)),
    ):
        assert found.shape == shape and found.is_meta


@pytest.mark.parametrize(
    "view",
    [
        lambda A: (2.0 * A).rows([1, 2]),
        lambda A: A.block(keys=(1, 4)).rows([1, 2]),
        lambda A: blend(torch.ones(6), A, A.take([0])).rows([1, 2]),
        lambda A: A.mix(torch.eye(12)).dense(),
        lambda A: (A + known_columns(torch.ones(1, 2, 6, 1), 3, tokens=12)).rows([0]),
    ],
    ids=["rows", "rows of a block", "rows of a blend", "entries", "known columns"],
)
def test_views_of_known_positions_do_not_wait_for_the_device(view) -> None:
    # Tensors without numbers: to ask for one is an error, as it is while a CUDA graph is captured.
    with FakeTensorMode():
        found = view(AttentionMap(torch.empty(1, 2, 6, 8), torch.empty(1, 2, 12, 8)))
    assert found.shape[:2] == (1, 2)
