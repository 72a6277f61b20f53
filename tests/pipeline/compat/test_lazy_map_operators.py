"""Operators and spellings of a tensor's that code for the matrix uses beside the common ones."""

import warnings

import numpy as np
import pytest
import torch

from fpe_pipeline.compat.lazy import LazyMap, MapNumbersWarning
from tests.support.lazy_maps import lazy_map
from tests.support.no_matrices import refuse_matrices

ROWS, QUERIES, KEYS = 4, 6, 5

LAZY = {
    "NumPy's number first": lambda A: np.float64(0.5) * A + np.float64(1) - np.linspace(0, 1, 3)[1] * A,
    "plus": lambda A: +A,
    "a sum by axis": lambda A: A.sum(axis=1),
    "a mean by axis": lambda A: A.mean(axis=0),
    "a sum in a dtype": lambda A: A.sum(0, dtype=torch.float64),
    "a mean in a dtype": lambda A: torch.mean(A, -1, dtype=torch.float64),
    "a mean of a list of no axes": lambda A: A.mean([]),
}
NUMBERS = {
    "absolute values": lambda A: abs(A - 0.2),
    "a rounded quotient": lambda A: A // 0.1,
    "a rounded quotient by name": lambda A: torch.div(A, 0.1, rounding_mode="floor"),
    "a remainder": lambda A: A % 0.1,
    "the larger of two": lambda A: torch.max(A, A * 2),
    "times no finite number": lambda A: (A * float("inf")).isinf().double(),
    "a norm": torch.norm,
    "a norm over keys": lambda A: torch.norm(A, dim=-1),
    "stacked behind the keys": lambda A: torch.stack([A, A], -1),
    "a tensor of it": lambda A: torch.as_tensor(A) if isinstance(A, LazyMap) else A,
    "a number in it": lambda A: torch.tensor((2.0 in A, 0.0 in A * 0)),
    "transposed, sliced": lambda A: A.transpose(1, 2)[:, 3] * 2,
    "transposed, computed with": lambda A: 1 - A.mT * 2 / 3 + A.mT,
    "transposed, concatenated": lambda A: torch.cat([A.mT, A.transpose(-1, -2)]),
    "transposed, times the map": lambda A: A.mT @ A,
    "transposed, times the map, by bmm": lambda A: torch.bmm(A.mT, A),
    "transposed, compared": lambda A: (A.mT > 0.2).double(),
    "transposed, its rows": lambda A: torch.stack(list(A.mT))[: len(A.mT)],
}


def lazy():
    return lazy_map(QUERIES, KEYS)


def check(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapNumbersWarning)
        result, expected = function(lazy()), function(lazy().numbers())
        result = result.numbers() if isinstance(result, LazyMap) else result
    assert isinstance(result, torch.Tensor)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LAZY)
def test_without_the_matrix(name, monkeypatch):
    check(LAZY[name])
    mine = lazy()
    refuse_matrices(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LAZY[name](mine)


@pytest.mark.parametrize("name", NUMBERS)
def test_by_numbers(name):
    check(NUMBERS[name])
