"""Every refusal says what was expected, what was received and what to do."""

from __future__ import annotations

import pytest
import torch

from fpe_kernels import AttentionMap, shared_attention

Q = torch.randn(2, 3, 5, 8)
K = torch.randn(2, 3, 7, 8)
V = torch.randn(2, 3, 7, 4)
MAP = AttentionMap(Q, K)

REFUSED = {
    "query is no tensor": (lambda: AttentionMap([1.0], K), TypeError, r"query must be a torch\.Tensor .*got list"),
    "query has heads merged": (lambda: AttentionMap(Q[0], K), ValueError, r"4 dimensions .*got 3.*Split heads first"),
    "query holds integers": (lambda: AttentionMap(Q.long(), K), TypeError, r"query must be float16.*got torch\.int64"),
    "key of another dtype": (
        lambda: AttentionMap(Q, K.half()),
        TypeError,
        r"float16 and torch\.float32.*key\.to\(quer",
    ),
    "query is sparse": (
        lambda: AttentionMap(Q.to_sparse(), K),
        TypeError,
        r"query must be dense in memory, got torch\.sparse_coo\. Convert with query\.to_dense",
    ),
    "key elsewhere": (
        lambda: AttentionMap(Q, K.to("meta")),
        ValueError,
        r"key must be on the device.*got meta and cpu",
    ),
    "key of another batch": (lambda: AttentionMap(Q, K[:1]), ValueError, r"agree in B: .*key\.expand"),
    "key of other heads": (lambda: AttentionMap(Q, K[:, :2]), ValueError, r"heads of query, or a divisor of them"),
    "key of another head dim": (lambda: AttentionMap(Q, K[..., :4]), ValueError, r"same head dim: got 8 and 4"),
    "no tokens": (lambda: AttentionMap(Q[:, :, :0], K), ValueError, r"no axis of query and key but .* may be empty"),
    "no head dim": (lambda: AttentionMap(Q[..., :0], K[..., :0]), ValueError, r"no axis of query .* may be empty"),
    "lengths that are one number": (lambda: AttentionMap(Q, K, key_lengths=3), TypeError, r"sequence of ints.*got 3"),
    "lengths for other maps": (lambda: AttentionMap(Q, K, key_lengths=[3]), ValueError, r"2 entries in \[0, 7\]"),
    "a length past the keys": (lambda: AttentionMap(Q, K, key_lengths=[3, 8]), ValueError, r"got \[3, 8\]"),
    "lengths that are none": (lambda: AttentionMap(Q, K, key_lengths=[3, 1.5]), TypeError, r"sequence of ints"),
    "lengths elsewhere": (
        lambda: AttentionMap(Q, K, key_lengths=torch.ones(2, device="meta")),
        ValueError,
        r"known on the host: got a tensor on meta\. Pass a list",
    ),
    "a value of other heads": (
        lambda: AttentionMap(Q, K[:, :1]) @ K[:, :2],
        ValueError,
        r"the 3 heads of the map or the 1 of its keys, got 2",
    ),
    "scale is text": (lambda: AttentionMap(Q, K, scale="1"), TypeError, r"scale must be a number or None, got str"),
    "scale is a tensor": (lambda: AttentionMap(Q, K, scale=Q[0, 0, 0, 0]), TypeError, r"scale must be a number"),
    "scale is NaN": (lambda: AttentionMap(Q, K, scale=float("nan")), ValueError, r"scale must be finite, got nan"),
    "scale is infinite": (lambda: AttentionMap(Q, K, scale=float("inf")), ValueError, r"scale must be finite, got inf"),
    "times NaN": (lambda: AttentionMap(Q, K) * float("nan"), ValueError, r"weight must be finite, got nan"),
    "a factor of a row that is infinite": (
        lambda: AttentionMap(Q, K).scale_rows([1.0, float("inf")]),
        ValueError,
        r"weight\[1\] must be finite, got inf",
    ),
    "bias is a list": (lambda: AttentionMap(Q, K, bias=[0.0]), TypeError, r"bias must be a torch\.Tensor or None"),
    "bias is a mask": (
        lambda: AttentionMap(Q, K, bias=torch.ones(5, 7, dtype=torch.bool)),
        TypeError,
        r"additive.*got torch\.bool.*masked_fill",
    ),
    "bias of another dtype": (
        lambda: AttentionMap(Q, K, bias=torch.ones(5, 7).half()),
        TypeError,
        r"bias must have the",
    ),
    "bias that does not fit": (
        lambda: AttentionMap(Q, K, bias=torch.ones(7, 5)),
        ValueError,
        r"broadcast to \[B, H, N, M\] = \[2, 3, 5, 7\], got \[7, 5\]",
    ),
    "bias of five axes": (
        lambda: AttentionMap(Q, K, bias=torch.ones(1, 1, 1, 5, 7)),
        ValueError,
        r"bias must broadcast",
    ),
    "backend without a name": (
        lambda: AttentionMap(Q, K, backend="cuda"),
        ValueError,
        r"'triton', 'torch', 'reference', 'auto'; got 'cuda'",
    ),
    "logsumexp is a number": (
        lambda: AttentionMap(Q, K, logsumexp=0.0),
        TypeError,
        r"logsumexp must be a torch\.Tensor",
    ),
    "logsumexp of keys": (
        lambda: AttentionMap(Q, K, logsumexp=torch.zeros(2, 3, 7)),
        ValueError,
        r"\[B, H, N\] = \[2, 3, 5\], got \[2, 3, 7\]",
    ),
    "logsumexp in half precision": (
        lambda: AttentionMap(Q, K, logsumexp=torch.zeros(2, 3, 5).half()),
        ValueError,
        r"torch\.float32 on cpu, got torch\.float16.*never kept in half",
    ),
    "value of another batch": (lambda: MAP @ V[:1], ValueError, r"value must have 2 batch rows here, got 1"),
    "value of other heads": (lambda: MAP @ V[:, :2], ValueError, r"value must have the 3 heads of the map, got 2"),
    "value of other tokens": (
        lambda: MAP @ V[:, :, :5],
        ValueError,
        r"value must have 7 tokens, .* got 5",
    ),
    "value of another dtype": (lambda: MAP @ V.double(), TypeError, r"value must have the dtype of query"),
    "value is a number": (lambda: MAP @ 2.0, TypeError, r"value must be a torch\.Tensor .*got float"),
    "no values": (lambda: MAP @ (), ValueError, r"A @ \(\) has no value"),
    "a wrong value among several": (lambda: MAP @ (V, V[0]), ValueError, r"value must have 4 dimensions"),
    "weight of the keys": (
        lambda: MAP.T @ V,
        ValueError,
        r"weight must agree with the map in \[B, H, N\].*sums over the",
    ),
    "weight of another dtype": (lambda: MAP.T @ Q.half(), TypeError, r"weight must have the dtype of query"),
    "row out of range": (lambda: MAP.rows(5), IndexError, r"token index must be in \[-5, 5\), got \[5\]"),
    "column out of range": (lambda: MAP.columns([-8]), IndexError, r"token index must be in \[-7, 7\), got \[-8\]"),
    "row by a fraction": (lambda: MAP.rows(1.5), TypeError, r"int or a flat sequence of ints, got torch\.float32"),
    "row by a mask": (lambda: MAP.rows(torch.ones(5, dtype=torch.bool)), TypeError, r"got torch\.bool"),
    "rows by a slice": (lambda: MAP.rows(slice(2)), TypeError, r"flat sequence of ints, got slice"),
    "rows by nothing": (lambda: MAP.rows(None), TypeError, r"flat sequence of ints, got None"),
    "rows by a table": (lambda: MAP.rows([[1, 2]]), TypeError, r"flat sequence of ints"),
    "a grid that is no grid": (lambda: MAP.pooled(5, (1, 7), 1), ValueError, r"query_grid must be \(height, width\)"),
    "a grid of other tokens": (lambda: MAP.pooled((1, 5), (2, 3), 1), ValueError, r"key_grid .* height · width = 7"),
    "a grid of fractions": (
        lambda: MAP.pooled((2.5, 2), (1, 7), 1),
        ValueError,
        r"query_grid must be .* got \(2\.5, 2\)",
    ),
    "blocks of fractions": (lambda: MAP.pooled((1, 5), (1, 7), 1.5), ValueError, r"size must be \(height.* got 1\.5"),
    "blocks of three axes": (
        lambda: MAP.pooled((1, 5), (1, 7), (1, 1, 1)),
        ValueError,
        r"size must be \(height, width",
    ),
    "more blocks than pixels": (lambda: MAP.pooled((1, 5), (1, 7), 2), ValueError, r"between \(1, 1\) and query_grid"),
    "no blocks": (lambda: MAP.pooled((1, 5), (1, 7), 0), ValueError, r"size must be between"),
    "map_index is a number": (lambda: shared_attention(Q, K, V, 0), TypeError, r"sequence of ints.*got int"),
    "map_index is text": (lambda: shared_attention(Q, K, V, "01"), TypeError, r"sequence of ints.*got str"),
    "map_index of fractions": (
        lambda: shared_attention(Q, K, V, [0, 0.5]),
        TypeError,
        r"map_index\[1\] must be an int",
    ),
    "map_index of truths": (lambda: shared_attention(Q, K, V, [True, 0]), TypeError, r"map_index\[0\] must be an int"),
    "map_index of float tensors": (
        lambda: shared_attention(Q, K, V, torch.zeros(2)),
        TypeError,
        r"map_index must hold integers, got a tensor of torch\.float32",
    ),
    "map_index elsewhere": (
        lambda: shared_attention(Q, K, V, torch.zeros(2, dtype=torch.int64, device="meta")),
        ValueError,
        r"known on the host.*Pass a list of ints",
    ),
    "map_index too large": (
        lambda: shared_attention(Q, K, V, [0, 2]),
        IndexError,
        r"map_index\[1\] is 2, but there are 2 map\(s\): expected 0 <= index < 2",
    ),
    "map_index below zero": (lambda: shared_attention(Q, K, V, [-1, 0]), IndexError, r"map_index\[0\] is -1"),
    "map_index of another length": (
        lambda: shared_attention(Q, K, V, [0]),
        ValueError,
        r"must have 1 batch rows here, got 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "index", [[0, 1], (0, 1), range(2), torch.tensor([0, 1])], ids=lambda index: type(index).__name__
)
def test_map_index_is_any_sequence_of_ints(index) -> None:
    torch.testing.assert_close(shared_attention(Q, K, V, index), MAP @ V)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (1, 5, 7), (3, 1, 1), (2, 1, 1, 7), ()])
def test_a_bias_may_leave_out_leading_axes(shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape)
    scores = Q @ K.transpose(-1, -2) * 8**-0.5 + bias
    torch.testing.assert_close(AttentionMap(Q, K, bias=bias) @ V, torch.softmax(scores, -1) @ V)
