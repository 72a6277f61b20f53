"""A lazy map in another dtype: a map of its own, as a tensor's copy is, that is computed in the wider dtype."""

import pytest
import torch

from fpe_kernels import AttentionMap
from fpe_pipeline.compat.lazy import LazyMap
from tests.support.lazy_maps import plain

ROWS, QUERIES, KEYS = 4, 6, 5


def factors(dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, tokens, 4, generator=generator).to(dtype) for tokens in (QUERIES, KEYS)]


def lazy(dtype=torch.float16):
    return LazyMap(AttentionMap(*factors(dtype), backend="reference"))


def dense():
    """Of the narrow factors, in float64."""
    query, key = (part.double() for part in factors())
    return torch.softmax(query @ key.transpose(-1, -2) / 2, dim=-1).flatten(0, 1)


def cut(A):
    return A[..., 1:4]


def put_together(A):
    A = A.clone()
    A[:, 1:3] = A[:, 3:5]
    return A


#: What float16 rounds, or cannot hold at all.
WIDE = {
    "large": lambda A: A.float() * 1e6,
    "small": lambda A: A.float() * 1e-7,
    "over a small number": lambda A: A.float() / 1e-6,
    "a large sum": lambda A: A.float() + 1e5,
    "large columns": lambda A: A.float() * torch.linspace(1e5, 1e6, KEYS),
    "a large column assigned": lambda A: assigned(A.float(), 1e6),
    "steps summed": lambda A: sum(A.float() for _ in range(64)),
    "summed into the wide one": lambda A: A.float().mul_(1e6).add_(A),
    "the wide one added": lambda A: A + A.float() * 1e6,
    "beside it": lambda A: torch.cat([A, A.float() * 1e6]),
    "a sum of columns": lambda A: (A.float() * 1e6).sum(1),
    "cut columns": lambda A: cut(A).float() * 1e6,
    "queries assigned": lambda A: put_together(A).float() * 1e6,
}


def assigned(A, value):
    A[..., 3] = value
    return A


@pytest.mark.parametrize("name", WIDE)
def test_what_was_widened_is_computed_so(name):
    result, expected = plain(WIDE[name](lazy())), WIDE[name](dense())
    assert result.dtype == torch.float32 and result.shape == expected.shape
    # What was narrow before has been rounded there, once or twice.
    rounded = 4 * torch.finfo(torch.float16).eps
    torch.testing.assert_close(result.double(), expected.double(), rtol=rounded, atol=0)


def test_a_wide_map_put_into_a_narrow_one():
    A, expected = lazy(), dense()
    A[1:3] = A[:2].float() * 0.5
    A[..., 1:3] = A.float()[..., 3:5]
    expected[1:3] = expected[:2] * 0.5
    expected[..., 1:3] = expected[..., 3:5].clone()
    assert plain(A).dtype == torch.float16
    torch.testing.assert_close(plain(A).double(), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("change", [lambda A: A.float(), lambda A: A.half(), lambda A: A.to(A.dtype, copy=True)])
def test_what_is_changed_in_a_copy_is_not_in_the_map(change):
    A, before = lazy(torch.float64), plain(lazy(torch.float64))
    copied = change(A)
    copied.zero_()
    assert torch.equal(plain(A), before) and plain(copied).abs().max() == 0
    same = A.to(torch.float64)
    same.zero_()
    assert plain(A).abs().max() == 0
