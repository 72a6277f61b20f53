"""What of a lazy map is a view and what a copy, as of a tensor: what is changed in place, and who sees it."""

import warnings

import numpy as np
import pytest
import torch

from fpe_pipeline.compat.lazy import MapNumbersWarning
from tests.support.lazy_maps import lazy_map, plain
from tests.support.no_matrices import refuse_matrices

ROWS, QUERIES, KEYS = 4, 6, 5


def lazy():
    return lazy_map(QUERIES, KEYS)


def by_grid(A):
    return A.reshape(2, 2, 2, 3, KEYS)


def permuted(A):
    return A.reshape(2, 2, QUERIES, KEYS).permute(1, 0, 2, 3)


#: Numbers of a part, changed in place in the map too, without the whole map's numbers.
LENT = {
    "a query": lambda A: A[:, 2],
    "a query of a row": lambda A: A[1][2],
    "a query, by select": lambda A: A.select(1, 3),
    "a range of a query's keys": lambda A: A[1:, 2, 1:3],
    "an entry of each row": lambda A: A[:, 2, 3],
    "an entry": lambda A: A[1, 2, 3],
    "a place of a grid": lambda A: by_grid(A)[:, 1, 1, 2],
    "a line of a grid": lambda A: by_grid(A)[1, :, 1],
    "every other column": lambda A: A[..., ::2],
    "the last of a row's queries": lambda A: list(A[0])[-1],
}
#: The same, by the whole map's numbers.
STRIDED = {
    "every other query": lambda A: A[:, ::2],
    "a column of a grid": lambda A: by_grid(A)[:, :, :, 1],
}
#: What a tensor gives copies of.
COPIES = {
    "listed rows": lambda A: A[[0, 3]],
    "rows of an array": lambda A: A[np.array([0, 3])],
    "rows of a tensor": lambda A: A[torch.tensor([0, 3])],
    "rows of a mask": lambda A: A[torch.tensor([True, False, True, False])],
    "columns of listed rows": lambda A: A[[0, 3], :, 1:3],
    "queries of listed rows": lambda A: A[[0, 3], 2:4],
    "listed columns": lambda A: A[..., [1, 2]],
    "rows in another order": lambda A: permuted(A).reshape(ROWS, QUERIES, KEYS),
    "rows in another order, contiguous": lambda A: permuted(A).contiguous(),
    "expanded rows, contiguous": lambda A: A[:1].expand(3, -1, -1).contiguous(),
}
ASSIGNED = {
    "a query": ((slice(None), 2), 0.5),
    "a query of a row": ((1, 2), torch.arange(5.0).double()),
    "an entry": ((1, 2, 3), 7.0),
    "keys of a query": ((slice(1, 3), 2, slice(1, 3)), torch.ones(2, 2).double()),
}


def changed(A, part):
    """The part, and what the map is after it was changed in place."""
    given = part(A)
    given.mul_(3.0)
    given.add_(1.0)
    return plain(given), plain(A * 1.0)


def same(mine, theirs):
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LENT)
def test_what_is_changed_in_a_part_is_changed_in_the_map(name, monkeypatch):
    expected = changed(plain(lazy()), LENT[name])
    mine = lazy()
    refuse_matrices(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LENT[name](mine).mul_(3.0).add_(1.0)
        total = mine.sum()
    monkeypatch.undo()
    torch.testing.assert_close(total, expected[1].sum())
    same(changed(lazy(), LENT[name]), expected)


@pytest.mark.parametrize("name", STRIDED | COPIES)
def test_what_is_changed_in_other_parts(name):
    part = (STRIDED | COPIES)[name]
    expected = changed(plain(lazy()), part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapNumbersWarning)
        same(changed(lazy(), part), expected)
    assert torch.equal(expected[1], plain(lazy())) == (name in COPIES)


@pytest.mark.parametrize("name", COPIES)
def test_copies_do_not_see_what_is_changed_in_the_map(name):
    A, before = lazy(), plain(lazy())
    copied = COPIES[name](A)
    A.zero_()
    torch.testing.assert_close(plain(copied), COPIES[name](before), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ASSIGNED)
def test_queries_assigned_without_the_matrix(name, monkeypatch):
    (key, value), mine, theirs = ASSIGNED[name], lazy(), plain(lazy())
    theirs[key] = value
    refuse_matrices(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine[key] = value
        mine.sum()
    monkeypatch.undo()
    torch.testing.assert_close(plain(mine), theirs, rtol=1e-12, atol=1e-13)


def test_no_rows():
    A, before = lazy(), plain(lazy())
    A[4:] = 0
    assert A[4:].shape == (0, QUERIES, KEYS) and A[4:, 2:4, 1].shape == (0, 2)
    assert torch.equal(plain(torch.cat([A[:0], A])), before)
