"""Maps whose scores cannot leave a range, known before any is computed: their softmax needs no largest score.

Softmax subtracts each row's largest score only so that no exponential leaves the range of the dtype. By the inequality
of Cauchy and Schwarz no score exceeds the longest query times the longest key, so where that product is small nothing
has to be subtracted, and two of four passes over a block of scores are left out: that for the maximum and that for the
difference. The result is as exact: a score is rounded when the product makes it, and the difference took nothing of
that away. Where the bound is larger, or not a number, the caller computes as always.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import LOG2E, working_dtype
from .cpu_threads import alone

# In units of log 2. Exponentials lie within 2^±64, their sums over a million keys under 2^84, and products with values
# within 2^±40 keep all their digits in float32.
MOST_SCORE, MOST_VALUE = 64.0, 2.0**40
# Scores of a head from which on the lengths of queries and keys cost nothing beside them.
LEAST_SCORES = 1 << 18


def bounded(
    query: Tensor, key: Tensor, value: Tensor, scale: float, group: int, rows: Sequence[int], length: int
) -> bool:
    """Whether the exponentials of a map's scores and their products with values stay in range as they are.

    It hangs on the map and the values that it multiplies alone: a row's bits do not hang on its neighbours' maps.

    Args:
        query, key, value: of all maps and batch rows, on a CPU.
        scale: factor of the scores.
        group: the map.
        rows: the batch rows that name it.
        length: number of its keys; what lies behind is not looked at.
    """
    if query.shape[2] * length < LEAST_SCORES:
        return False
    with alone():
        return _scores_in_range(query[group], key[group, :, :length], scale) and _values_in_range(value, rows, length)


def _scores_in_range(query: Tensor, key: Tensor, scale: float) -> bool:
    """For the queries [H, N, D] and keys [H or fewer, M, D] of a map."""
    dtype = working_dtype(query.dtype)
    longest_query = torch.linalg.vector_norm(query, dim=-1, dtype=dtype).amax(-1)
    longest_key = torch.linalg.vector_norm(key, dim=-1, dtype=dtype).amax(-1)
    heads = longest_query.unflatten(0, (longest_key.shape[0], -1)).amax(-1)  # query heads that share a key head
    return float((heads * longest_key).max()) * abs(scale) * LOG2E <= MOST_SCORE


def _values_in_range(value: Tensor, rows: Sequence[int], length: int) -> bool:
    """For the first values of some batch rows."""
    for row in rows if value.shape[3] else ():  # without columns the log-sum-exp alone is asked for
        smallest, largest = torch.aminmax(value[row, :, :length])
        most = max(-float(smallest), float(largest))
        if not (most == 0.0 or 1.0 / MOST_VALUE <= most <= MOST_VALUE):
            return False
    return True
