"""Maps whose scores cannot leave a range are computed without a shift, as exactly as others, and only these."""

import math

import pytest
import torch

from fpe_kernels import shared_attention
from fpe_kernels.backends import bounded as bounds
from fpe_kernels.backends import chunked, whole_maps
from fpe_kernels.backends.bounded import LEAST_SCORES, MOST_SCORE, MOST_VALUE, bounded
from fpe_kernels.backends.protocol import Maps

# Several blocks of keys, one block that PyTorch's softmax would serve, and heads that share a key head.
SHAPES = {"blocks": (160, 2100, 2, 2), "whole": (512, 768, 2, 2), "grouped": (256, 1100, 4, 2)}


def operands(shape, score=20.0, dtype=torch.float32, value=1.0):
    """Queries and keys whose bound is ``score`` in units of log 2, and the values of two rows that share the map."""
    queries, keys, heads, key_heads = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)
    query, key = (
        torch.randn(1, h, n, 24, generator=generator, dtype=torch.float64)
        for h, n in ((heads, queries), (key_heads, keys))
    )
    longest = query.norm(dim=-1).amax(-1).unflatten(1, (key_heads, -1)).amax(-1) * key.norm(dim=-1).amax(-1)
    query *= score / (float(longest.max()) * 24**-0.5 * math.log2(math.e))
    values = torch.randn(2, heads, keys, 24, generator=generator, dtype=torch.float64) * value
    return query.to(dtype), key.to(dtype), values.to(dtype)


def computed(query, key, value):
    """By the backend: the product and the log-sum-exp."""
    maps = Maps(query, key, None, (0, 0), query.shape[3] ** -0.5, None)
    logsumexp = query.new_empty(query.shape[:3])
    out = value.new_full((2, query.shape[1], query.shape[2], value.shape[3]), float("nan"))
    chunked.apply(maps, value, out, logsumexp, False)
    return out, logsumexp


def exact(query, key, value):
    query, key, value = query.double(), key.double(), value.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * query.shape[3] ** -0.5
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.fixture
def ways(monkeypatch):
    """Which way each block of a call was computed."""
    taken = []

    def noted(name):
        before = getattr(chunked, name)
        monkeypatch.setattr(chunked, name, lambda *a: (taken.append(name), before(*a))[1])

    for name in ("_bounded_product", "_online_product"):
        noted(name)
    write = whole_maps.WholeBlock.write

    def whole(block, query, key, value, scale, in_range, *rest):
        taken.append("whole, bounded" if in_range else "whole")
        write(block, query, key, value, scale, in_range, *rest)

    monkeypatch.setattr(whole_maps.WholeBlock, "write", whole)
    return taken


@pytest.mark.parametrize(("shape", "way"), [("blocks", "_bounded_product"), ("whole", "whole, bounded")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [1.0, 20.0, MOST_SCORE * 0.999])
def test_as_exact_as_with_a_shift(ways, monkeypatch, shape, way, dtype, score):
    tensors = operands(shape, score, dtype)
    product, logsumexp = computed(*tensors)
    assert set(ways) == {way}
    expected, expected_logsumexp = exact(*tensors)
    monkeypatch.setattr(chunked, "bounded", lambda *_: False)
    shifted, shifted_logsumexp = computed(*tensors)
    for ours, other, right in (
        (product, shifted, expected),
        (logsumexp, shifted_logsumexp, expected_logsumexp),
    ):
        allowance = 8 * torch.finfo(dtype).eps * max(1.0, float(right.abs().max()))
        assert float((ours - right).abs().max()) <= 2 * float((other - right).abs().max()) + allowance


def test_heads_that_share_keys(ways):
    tensors = operands("grouped")
    product, _ = computed(*tensors)
    assert set(ways) == {"_bounded_product"}
    torch.testing.assert_close(product.double(), exact(*tensors)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", ["blocks", "whole"])
@pytest.mark.parametrize("score", [MOST_SCORE * 1.001, 4000.0])
def test_larger_scores_take_the_shift(ways, shape, score):
    tensors = operands(shape, score)
    product, _ = computed(*tensors)
    assert set(ways) <= {"_online_product", "whole"} and ways
    assert product.isfinite().all()


@pytest.mark.parametrize("value", [MOST_VALUE**2, MOST_VALUE**-2])
def test_values_out_of_range_take_the_shift(ways, monkeypatch, value):
    tensors = operands("blocks", MOST_SCORE * 0.999, value=value)
    product, _ = computed(*tensors)
    assert set(ways) == {"_online_product"}
    error = float((product.double() - exact(*tensors)[0]).abs().max()) / value
    assert error < 1e-4


def test_zeros_as_values(ways):
    query, key, value = operands("blocks")
    value[1] = 0.0
    product, _ = computed(query, key, value)
    assert set(ways) == {"_bounded_product"} and (product[1] == 0.0).all()


def test_without_columns():
    """The log-sum-exp alone is a product with no values."""
    query, key, value = operands("blocks")
    _, logsumexp = computed(query, key, value[..., :0])
    torch.testing.assert_close(logsumexp.double(), exact(query, key, value)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_what_is_not_finite_is_no_bound(ways, place):
    query, key, value = operands("blocks")
    {"query": query, "key": key, "value": value}[place][0, 0, 5, 3] = float("nan")
    product, _ = computed(query, key, value)
    assert set(ways) == {"_online_product"}
    assert product[0, 0].isnan().any() and product[1, 1].isfinite().all()


def test_keys_behind_the_last_are_not_looked_at():
    query, key, value = operands("whole")
    key[:, :, 600:] = float("inf")
    value[:, :, 600:] = float("nan")
    scale = query.shape[3] ** -0.5
    assert bounded(query, key, value, scale, 0, (0, 1), 600)
    assert not bounded(query, key, value, scale, 0, (0, 1), 601)


def test_small_maps_are_not_asked(monkeypatch):
    query, key, value = operands("whole")
    keys = LEAST_SCORES // query.shape[2]
    monkeypatch.setattr(bounds.torch.linalg, "vector_norm", None)
    assert not bounded(query, key, value, 1.0, 0, (0, 1), keys - 1)
    with pytest.raises(TypeError):
        bounded(query, key, value, 1.0, 0, (0, 1), keys)


def test_maps_that_a_fused_call_serves_are_not_asked(monkeypatch):
    query, key, value = (torch.cat([tensor] * 2)[:2] for tensor in operands("whole"))
    assert query.shape[2] * key.shape[2] >= LEAST_SCORES and query.shape[3] == value.shape[3]
    asked = []
    monkeypatch.setattr(chunked, "bounded", lambda *arguments: asked.append(arguments[4]))
    torch.ops.fpe_kernels.apply(query, key, value, None, [0, 1], 0.1, "torch")
    assert asked == []


def test_a_call_that_is_kept_ready_asks_every_time(ways):
    """The way hangs on the numbers, which a call of the same layout has others of."""
    query, key, value = operands("whole")
    for factor, way in ((1.0, "whole, bounded"), (1.0, "whole, bounded"), (100.0, "whole"), (1.0, "whole, bounded")):
        ways.clear()
        product = shared_attention(query * factor, key, value, (0, 0), backend="torch")
        assert set(ways) == {way}
        torch.testing.assert_close(product.double(), exact(query * factor, key, value)[0], rtol=0, atol=2e-4)
