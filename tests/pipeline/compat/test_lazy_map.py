"""A lazy map gives what the matrix gives, in float64, without the matrix wherever it says so."""

import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch

from fpe_kernels import AttentionMap
from fpe_pipeline.compat.lazy import LazyMap, MapNumbersWarning, numbers
from tests.support.lazy_maps import plain
from tests.support.no_matrices import refuse_matrices

BATCH, HEADS, QUERIES, KEYS = 2, 4, 12, 7
WIDTH = 2  # a head's channels: few, so that what a map is made from is less than the map
ROWS = BATCH * HEADS


def factors():
    generator = torch.Generator().manual_seed(0)
    shapes = (BATCH, HEADS, QUERIES, WIDTH), (BATCH, HEADS, KEYS, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def lazy():
    return LazyMap(AttentionMap(*factors(), backend="reference"), halves=(1, 1))


def dense():
    query, key = factors()
    return torch.softmax(query @ key.transpose(-1, -2) * WIDTH**-0.5, dim=-1).flatten(0, 1)


given = SimpleNamespace(
    columns=torch.linspace(0.1, 2, KEYS).double(),
    queries=torch.linspace(-1, 1, QUERIES).double()[:, None],
    rows=torch.arange(1.0, ROWS + 1).double()[:, None, None],
    values=torch.linspace(-1, 1, ROWS * KEYS * 5).double().reshape(ROWS, KEYS, 5),
    weights=torch.linspace(0, 1, ROWS * 3 * QUERIES).double().reshape(ROWS, 3, QUERIES),
    mappers=torch.linspace(0, 1, 3 * KEYS * KEYS).double().reshape(3, KEYS, KEYS),
    column=torch.linspace(0, 1, ROWS * QUERIES).double().reshape(ROWS, QUERIES),
)


def assigned(A, key, value):
    A[key] = value(A) if callable(value) else value
    return A


def edited_as_prompt_to_prompt_does(A):
    conditional = A[ROWS // 2 :]
    by_prompt = conditional.reshape(2, HEADS // 2, *conditional.shape[1:])
    base, others = by_prompt[0], by_prompt[1:]
    alpha = given.columns.clamp(max=1)
    mixed = torch.einsum("hpw,bwn->bhpn", base, given.mappers[:1]) * alpha + (1 - alpha) * others
    by_prompt[1:] = mixed
    return A


def averaged(A):
    total = A * 0.5
    total += A
    total += A[ROWS // 2 :].repeat(2, 1, 1)
    return total / 3


def aggregated(A):
    layers = [part.reshape(2, -1, 3, 4, KEYS)[1] for part in (A, A * 2)]
    whole = torch.cat(layers, dim=0)
    return (whole.sum(0) / whole.shape[0])[:, :, 5]


def blended(A):
    maps = torch.cat([part.reshape(2, -1, 1, 3, 4, KEYS) for part in (A, A * 2)], dim=1)
    return (maps * given.columns[None, None, None, None, None]).sum(-1).mean(1)


def changed_through_a_column(A):
    A[:, :, 2].mul_(3.0)
    return A


def seen_through_cuts(A):
    columns, queries, column = A[:, :, 1:5], A[2:, 3:7], A[1, :, 6]
    A[:, :, 2] = 0
    queries *= 2
    columns += 1
    total = A.sum() + columns.sum() + queries.sum()
    column.mul_(7)
    column.add_(1)
    return A * total + columns.mean() + queries[..., 1:3].sum()


def changed_after_many_others(A):
    first = A[..., 0]
    others = [A[..., place % KEYS].sum() for place in range(20)]
    first.mul_(3)
    return A * sum(others)


def normalised_rows(A):
    A[:, :, 0] = 0
    return A / A.sum(-1, keepdim=True)


#: What needs no numbers: the issue's list, and the lines of Prompt-to-Prompt's notebook.
LAZY = {
    "itself": lambda A: A,
    "rows": lambda A: A[ROWS // 2 :],
    "one row": lambda A: A[-1],
    "listed rows": lambda A: A[torch.tensor([5, 0, 5])],
    "every other row": lambda A: A[::2],
    "rows and heads": lambda A: A.reshape(BATCH, HEADS, QUERIES, KEYS)[1:, 2],
    "a range of queries": lambda A: A[2:, 3:9],
    "a range of columns": lambda A: A[..., 1:4],
    "columns": lambda A: A[:, :, 2],
    "listed columns": lambda A: A[..., [1, 5]],
    "queries": lambda A: A[:, 3],
    "a new axis": lambda A: A[None] * given.mappers[:, :1, None],
    "product": lambda A: A @ given.values,
    "product of rows": lambda A: A[2:] @ given.values[2:],
    "bmm": lambda A: torch.bmm(A, given.values),
    "matmul": lambda A: torch.matmul(A, given.values[0]),
    "einsum of values": lambda A: torch.einsum("b i j, b j d -> b i d", A, given.values),
    "einsum of heads": lambda A: torch.einsum("bhij,jd->bhid", A.reshape(BATCH, HEADS, QUERIES, KEYS), given.values[0]),
    "einsum of mappers": lambda A: torch.einsum("hpw,bwn->bhpn", A, given.mappers),
    "transposed product": lambda A: A.transpose(-1, -2) @ given.weights.transpose(-1, -2),
    "product from the left": lambda A: given.weights @ A,
    "sum over columns": lambda A: A.sum(-1),
    "mean over columns, kept": lambda A: A.mean(dim=-1, keepdim=True),
    "sum over queries": lambda A: A.sum(1),
    "mean over rows": lambda A: A.mean(0),
    "mean over heads": lambda A: torch.mean(A.reshape(BATCH, HEADS, QUERIES, KEYS), dim=1),
    "mean over heads, kept": lambda A: A.reshape(BATCH, HEADS, QUERIES, KEYS).mean(1, keepdim=True),
    "sum over heads and queries": lambda A: A.reshape(BATCH, HEADS, QUERIES, KEYS).sum((1, 2)),
    "sum of all": lambda A: torch.sum(A),
    "sum over a grid's rows": lambda A: A.reshape(ROWS, 3, 4, KEYS).sum(1),
    "times a number": lambda A: 3 * A,
    "divided": lambda A: torch.div(A, 4),
    "times columns": lambda A: given.columns * A,
    "times queries": lambda A: A * given.queries,
    "times rows": lambda A: A * given.rows,
    "added": lambda A: A + A[:1],
    "subtracted from a number": lambda A: 1 - A,
    "a tensor added": lambda A: given.columns + A,
    "mixed with itself": lambda A: given.columns * A + (1 - given.columns) * A.mean(0),
    "negative": lambda A: -A,
    "rows assigned": lambda A: assigned(A, slice(4, None), lambda A: A[:4]),
    "a column set to zero": lambda A: assigned(A, (..., 3), 0),
    "columns set to a number": lambda A: assigned(A, (slice(2, None), slice(None), slice(1, 3)), 0.25),
    "a column from another": lambda A: assigned(A, (..., 3), lambda A: A[..., 5]),
    "a column from a tensor": lambda A: assigned(A, (..., 3), given.column),
    "columns from a map": lambda A: assigned(A, (..., slice(0, 2)), lambda A: A[..., 4:6]),
    "queries set to zero": lambda A: assigned(A, (slice(None), slice(2, 5)), 0),
    "a block of entries": lambda A: assigned(A, (slice(None), slice(2, 5), 1), 0.5),
    "all of it": lambda A: A.copy_(A * 2),
    "zeroed": lambda A: A.zero_(),
    "in place": lambda A: A.mul_(2).add_(A),
    "a clone edited": lambda A: assigned(A.clone(), (..., 0), 0) + A,
    "zeros like it": lambda A: torch.zeros_like(A) + A,
    "concatenated": lambda A: torch.cat([A[:2], A[6:]]),
    "stacked": lambda A: torch.stack([A, A * 2], dim=1),
    "chunks": lambda A: A.chunk(2)[1],
    "flattened": lambda A: A.unflatten(0, (BATCH, HEADS)).flatten(0, 1),
    "permuted": lambda A: A.reshape(BATCH, HEADS, QUERIES, KEYS).permute(1, 0, 2, 3),
    "expanded": lambda A: A[:1].expand(3, -1, -1),
    "in float32": lambda A: A.float().double() * 0 + A,
    "normalised": normalised_rows,
    "changed through a column": changed_through_a_column,
    "seen through cuts": seen_through_cuts,
    "changed after many others": changed_after_many_others,
    "averaged over steps": averaged,
    "Prompt-to-Prompt": edited_as_prompt_to_prompt_does,
    "aggregated": aggregated,
    "the local blend's heat": blended,
}
#: What needs them.
NUMBERS = {
    "a power": lambda A: A**1.1,
    "an exponential": torch.exp,
    "a comparison": lambda A: (A > 0.1).double(),
    "two maps, entry by entry": lambda A: A * A,
    "clamped in place": lambda A: A.clamp_(0.1, 0.2),
    "lists of two axes": lambda A: A[[0, 1], [2, 3]],
    "a table of columns": lambda A: A[:, :, torch.tensor([[1, 2, 3, 4], [3, 4, 5, 6]])],
    "listed queries assigned": lambda A: assigned(A, (slice(None), [1, 3]), 0.0),
    "a shape across axes": lambda A: A.reshape(-1, KEYS),
    "where": lambda A: torch.where(A > 0.2, A, 0.0),
}
#: What a block of rows at a time is enough for.
BLOCKS = {
    "the largest": lambda A: A.topk(2, dim=-1).values,
    "their places": lambda A: torch.topk(A, 2).indices,
    "maxima": lambda A: A.max(-1).values,
    "maxima by amax": lambda A: A.reshape(ROWS, 3, 4, KEYS).amax(-1, keepdim=True),
    "deviations": lambda A: A.std(-1),
}


def check(function, monkeypatch):
    """What ``function`` gives and what it leaves in its argument are the matrix's."""
    mine, theirs = lazy(), dense()
    result, expected = function(mine), function(theirs)
    monkeypatch.undo()
    assert result.shape == expected.shape and result.dtype == expected.dtype
    torch.testing.assert_close(plain(result), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(plain(mine), theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LAZY)
def test_without_the_matrix(name, monkeypatch):
    refuse_matrices(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(LAZY[name], monkeypatch)


@pytest.mark.parametrize("name", NUMBERS | BLOCKS)
def test_numbers_where_they_are_needed(name, monkeypatch):
    numbers.forget_lines()
    with pytest.warns(MapNumbersWarning, match=rf"{__file__}:\d+ needs the numbers of an attention map \(.*bytes"):
        check((NUMBERS | BLOCKS)[name], monkeypatch)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_rows_at_a_time(name, monkeypatch):
    numbers.forget_lines()
    monkeypatch.setattr(numbers, "BLOCK_BYTES", 3 * ROWS * KEYS * 8)
    sizes, mine = [], lazy()

    def noted(rows):
        for start, block in numbers.blocks_of_rows(rows):
            sizes.append(block.shape[-2])
            yield start, block

    monkeypatch.setattr("fpe_pipeline.compat.lazy.arithmetic.blocks_of_rows", noted)
    with pytest.warns(MapNumbersWarning, match="bytes at a time"):
        result = BLOCKS[name](mine)
    assert sizes == [3, 3, 3, 3]
    torch.testing.assert_close(result, BLOCKS[name](dense()), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["changed through a column", "Prompt-to-Prompt", "columns from a map", "normalised"])
def test_in_inference_mode(name, monkeypatch):
    with torch.inference_mode():
        check(LAZY[name], monkeypatch)


def lazy_of(query, key, backend="auto"):
    return LazyMap(AttentionMap(query, key, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["Prompt-to-Prompt", "normalised", "mixed with itself", "the local blend's heat"])
def test_other_dtypes(name, dtype):
    """The numbers of the rounded factors, to the rounding of a few operations in the dtype."""
    narrow = [part.to(dtype) for part in factors()]
    query, key = (part.double() for part in narrow)
    matrix = torch.softmax(query @ key.transpose(-1, -2) * WIDTH**-0.5, dim=-1).flatten(0, 1)
    result, expected = LAZY[name](lazy_of(*narrow)), LAZY[name](matrix)
    assert result.dtype in (dtype, torch.promote_types(dtype, torch.float32))
    bound = 8 * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    assert (plain(result).double() - expected).abs().max() <= bound


@pytest.mark.parametrize("name", ["product", "columns", "aggregated", "mixed with itself", "a range of columns"])
def test_gradients_go_through_it(name):
    """As Attend-and-Excite asks for them."""
    query, key = (part.requires_grad_() for part in factors())
    matrix = torch.softmax(query @ key.transpose(-1, -2) * WIDTH**-0.5, dim=-1).flatten(0, 1)
    results = LAZY[name](lazy_of(query, key, "reference")), LAZY[name](matrix)
    mine, theirs = (torch.autograd.grad(plain(result).square().sum(), (query, key)) for result in results)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert theirs[0].abs().max() > 0


def test_what_is_dropped_is_let_go_of_at_once():
    """Queries and keys of a layer must not wait for the collector of circles."""
    gc.disable()
    try:
        attention = lazy()
        attention[:, :, 2].mul_(2)
        attention[:, 1:3] *= 2
        attention[:, :, 1:3] += 1
        attention.sum()
        dropped = weakref.ref(attention.operator), weakref.ref(attention._storage)
        del attention
        assert [one() for one in dropped] == [None, None]
    finally:
        gc.enable()


def test_detached_maps():
    query, key = (part.requires_grad_() for part in factors())
    attention = lazy_of(query, key, "reference")
    assert attention.requires_grad
    with pytest.warns(MapNumbersWarning):
        assert not attention.detach().requires_grad
    with torch.no_grad():
        assert isinstance(attention.detach(), LazyMap)


def test_a_sum_over_steps_is_numbers_as_soon_as_they_are_less():
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(2, BATCH, HEADS, 9, 4, generator=generator).double() for _ in range(4)]
    total, expected = lazy_of(*steps[0], "reference").clone(), None
    held = []
    for step in steps:
        matrix = torch.softmax(step[0] @ step[1].transpose(-1, -2) / 2, dim=-1).flatten(0, 1)
        expected = matrix if expected is None else expected + matrix
        if step is not steps[0]:
            total += lazy_of(*step, "reference")
        held.append(total.holds_numbers)
    assert held == [False, False, True, True] and total.nbytes == total.numel() * 8
    torch.testing.assert_close(plain(total / 4), expected / 4)


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        (lambda A: A.reshape(5, 5), RuntimeError, "does not hold the"),
        (lambda A: A[0, 0, 0, 0], IndexError, "too many indices"),
        (lambda A: A[:, :, 7], IndexError, "column 7 is out of range: the map has 7"),
        (lambda A: A + torch.ones(3, 5), ValueError, "broadcast"),
        (lambda A: A * torch.ones(3), ValueError, r"\(3,\) does not broadcast"),
        (lambda A: A @ torch.ones(6, 2), ValueError, "takes 7 tokens, got 6"),
        (lambda A: A.sum(3), IndexError, "dim 3 is out of range"),
        (lambda A: A.expand(2, -1, -1, -1).zero_(), RuntimeError, r"clone\(\) the map first"),
        (lambda A: assigned(A, (..., 9), 0), IndexError, "column 9 is out of range"),
        (lambda A: assigned(A, (..., 1), "x"), TypeError, "a map, a tensor or a number to assign"),
        (lambda A: A.attention, AttributeError, "no attribute 'attention', as a tensor has none"),
    ],
)
def test_refusals(wrong, error, said):
    with pytest.raises(error, match=said):
        wrong(lazy())


def test_heads_that_cannot_be_told_apart_are_refused():
    query, key = factors()
    with pytest.raises(TypeError, match="a head a row"):
        LazyMap(AttentionMap(query, key) * 2)
