"""Numbers that vary from call to call in one compiled function: torch.compile traces scales and sizes as symbols."""

import pytest
import torch

from fpe_kernels import AttentionMap, known_columns, shared_attention


def inputs(head_dim):
    noise = torch.Generator().manual_seed(head_dim)
    return [torch.randn(1, 2, 5, head_dim, generator=noise) for _ in range(3)]


def test_a_scale_that_varies_breaks_no_graph():
    def attend(query, key, value, scale):
        return shared_attention(query, key, value, (0,), scale=scale, backend="torch")

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for head_dim, scale in ((4, 0.5), (6, 0.4), (8, 0.35)):
        query, key, value = inputs(head_dim)
        expected = torch.softmax(scale * query @ key.mT, -1) @ value
        torch.testing.assert_close(compiled(query, key, value, scale), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "scale", [float("inf"), -float("inf"), float("nan"), 10**400, -(10**5000)], ids=lambda s: f"{type(s)}"
)
def test_a_scale_that_is_not_finite(scale):
    with pytest.raises(ValueError, match="scale must be finite"):
        shared_attention(*inputs(4), (0,), scale=scale)


def test_sizes_that_vary_beside_those_that_are_known():
    """As many heads as rows are one symbol, which is a number from where the rows decide what is launched."""

    def attend(query, key, value):
        A = AttentionMap(query, key, key_lengths=[3, 7])
        edited = A.scale_columns(torch.ones(7)) + known_columns(query[..., :1], 0, tokens=7)
        return A.matmul(value), A.matmul(2.0 * value), edited.matmul(value)

    compiled = torch.compile(attend, backend="eager", fullgraph=True, dynamic=True)
    noise = torch.Generator().manual_seed(0)
    for queries in (6, 9):
        operands = [torch.randn(2, 2, tokens, 8, generator=noise) for tokens in (queries, 7, 7)]
        for found, expected in zip(compiled(*operands), attend(*operands), strict=True):
            torch.testing.assert_close(found, expected)


def test_the_entries_of_maps_whose_tokens_vary():
    class Entries(torch.nn.Module):
        def forward(self, query, key):
            return (0.5 * AttentionMap(query, key)).dense()

    noise = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, tokens, 4, generator=noise) for tokens in (6, 7))
    varying = {2: torch.export.Dim("tokens", min=3, max=50)}
    exported = torch.export.export(Entries(), (query, key), dynamic_shapes=(varying, None), strict=False)
    longer = query.repeat(1, 1, 2, 1)
    torch.testing.assert_close(exported.module()(longer, key), Entries()(longer, key))
