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
        ((torch.ones(1, 2, 5, 1), 7, 7), IndexError, r"\[-7, 7\)"),
        ((torch.ones(1, 2, 5, 1, dtype=torch.int64), 0, 7), TypeError, "float16"),
    ],
)
def test_refusals(arguments, error, said):
    with pytest.raises(error, match=said):
        known_columns(*arguments)
