"""Columns that are known as numbers are a map like any other: in products, adjoints, sums and gathers."""

import pytest
import torch

from fpe_kernels import AttentionMap, known_columns

BATCH, HEADS, QUERIES, KEYS = 2, 3, 5, 7
INDEX = [6, 0, 3]


def numbers(*shape, dtype=torch.float64):
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def written_out(columns, index=INDEX):
    out = columns.new_zeros(BATCH, HEADS, QUERIES, KEYS)
    out[..., index] = columns
    return out


@pytest.fixture
def columns():
    return numbers(BATCH, HEADS, QUERIES, len(INDEX)).requires_grad_()


def test_products_adjoints_and_views(columns):
    made, dense = known_columns(columns, INDEX, KEYS), written_out(columns)
    value, weight = numbers(BATCH, HEADS, KEYS, 4), numbers(BATCH, HEADS, QUERIES, 2)
    torch.testing.assert_close(made @ value, dense @ value)
    torch.testing.assert_close(made.T @ weight, dense.transpose(-1, -2) @ weight)
    torch.testing.assert_close(made.dense(), dense)
    torch.testing.assert_close(made.rows([1, 4]), dense[:, :, [1, 4]])
    torch.testing.assert_close(made.queries(1, 3).dense(), dense[:, :, 1:3])
    torch.testing.assert_close(made.take([1, 1, 0]).dense(), dense[[1, 1, 0]])
    torch.testing.assert_close(made.scale_rows(numbers(QUERIES)).dense(), dense * numbers(QUERIES)[:, None])
    torch.testing.assert_close(made.block(keys=(2, 7)).dense(), dense[..., 2:])
    assert made.nbytes == columns.numel() * 8


def test_a_column_of_a_map_is_assigned(columns):
    attention = AttentionMap(numbers(BATCH, HEADS, QUERIES, 8), numbers(BATCH, HEADS, KEYS, 8).cos())
    others = torch.ones(KEYS, dtype=torch.float64)
    others[INDEX] = 0
    edited = attention.scale_columns(others) + known_columns(columns, INDEX, KEYS)
    expected = attention.dense()
    expected[..., INDEX] = columns
    torch.testing.assert_close(edited.dense(), expected)


def test_gradients_reach_the_columns(columns):
    value = numbers(BATCH, HEADS, KEYS, 4)
    (mine,) = torch.autograd.grad((known_columns(columns, INDEX, KEYS) @ value).square().sum(), columns)
    (theirs,) = torch.autograd.grad((written_out(columns) @ value).square().sum(), columns)
    torch.testing.assert_close(mine, theirs)


def test_half_precision_keeps_its_dtype():
    made = known_columns(numbers(1, 2, 5, 1, dtype=torch.float16), 3, KEYS)
    weighted = 0.5 * made
    assert (weighted @ numbers(1, 2, KEYS, 4, dtype=torch.float16)).dtype == torch.float16
    assert made.dtype == torch.float16 and made.shape == (1, 2, 5, KEYS)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((torch.ones(1, 2, 5), [0], 7), ValueError, "4 dimensions"),
        ((torch.ones(1, 2, 5, 2), [0], 7), ValueError, "one position for each"),
        ((torch.ones(1, 2, 5, 2), [0, -7], 7), ValueError, "twice"),
        ((torch.ones(1, 2, 5, 2), torch.tensor([0, -7]), 7), ValueError, "twice"),
        ((torch.ones(1, 2, 5, 1), 7, 7), IndexError, r"\[-7, 7\)"),
        ((torch.ones(1, 2, 5, 1, dtype=torch.int64), 0, 7), TypeError, "float16"),
        ((torch.ones(1, 2, 5, 1), 0, 3.5), ValueError, r"tokens must be the number.*got 3\.5"),
        ((torch.ones(1, 2, 5, 0), [], -3), ValueError, r"tokens must be the number.*got -3"),
    ],
)
def test_refusals(arguments, error, said):
    with pytest.raises(error, match=said):
        known_columns(*arguments)


@pytest.mark.parametrize("index", [INDEX, torch.tensor(INDEX)], ids=["list", "tensor"])
def test_assigning_columns_compiles_into_one_graph(columns, index):
    def product(query, key, columns, value):
        kept = AttentionMap(query, key).scale_columns(torch.linspace(0, 1, KEYS, dtype=query.dtype))
        edited = kept + known_columns(columns, index, KEYS)
        return edited.matmul(value), edited.rows([1])

    tensors = numbers(BATCH, HEADS, QUERIES, 8), numbers(BATCH, HEADS, KEYS, 8), columns, numbers(BATCH, HEADS, KEYS, 4)
    torch.compiler.reset()
    compiled = torch.compile(product, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), product(*tensors))


def test_rows_of_a_combination_are_those_of_its_maps(columns):
    query, key = numbers(BATCH, HEADS, QUERIES, 8), numbers(BATCH, HEADS, KEYS, 8).cos()
    attention, matrix = AttentionMap(query, key), torch.softmax(query @ key.transpose(-1, -2) * 8**-0.5, dim=-1)
    weight, mixer = numbers(BATCH, HEADS, QUERIES), numbers(KEYS, KEYS)
    edited = attention.take([1, 0]).mix(mixer).scale_rows(weight) + 0.5 * known_columns(columns, INDEX, KEYS)
    expected = weight[..., None] * (matrix[[1, 0]] @ mixer) + 0.5 * written_out(columns)
    torch.testing.assert_close(edited.rows([4, 0]), expected[:, :, [4, 0]])
    block = attention.block(keys=(2, 6)) - attention.take([0, 0]).block(keys=(2, 6))
    torch.testing.assert_close(block.rows(1), (matrix - matrix[:1])[:, :, 1:2, 2:6])
    one = AttentionMap(query[:1], key[:1]).take([0, 0])
    torch.testing.assert_close(one.rows([2]), matrix[[0, 0], :, 2:3])
