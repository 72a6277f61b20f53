"""Random cases: everything about a case follows from its seed, so one number repeats a failure."""

from __future__ import annotations

import random

import pytest
import torch

from fpe_kernels.backends.reference import repeated
from fpe_kernels.testing import LAYOUTS, Case, assert_matches, make_case
from tests.support.contract import cut_small_blocks
from tests.support.contract_gradients import leaves_of

OPS = torch.ops.fpe_kernels


def random_case(seed: int, backend: str, device: str) -> Case:
    """The case of ``seed``: shapes, layouts, dtype, shared maps and heads, lengths, bias, scale, row weights."""
    rng = random.Random(seed)
    interpreted = backend == "triton" and device == "cpu"
    dtypes = [torch.float32, torch.float16, torch.bfloat16] + ([] if backend == "triton" else [torch.float64])
    tokens = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65]
    longer = [] if interpreted else [100, 127, 129, 200, 257]
    tokens = rng.choice([tokens[:-2], tokens]) if interpreted else tokens  # a second tile costs as much as the first
    maps = rng.choice([1, 1, 1, 1, 2] if interpreted else [1, 1, 2, 3, 4])
    rows = rng.choice([1, 2, 2, 3] if interpreted else [1, 2, 3, 4, 6])
    bias = None if rng.random() < 0.4 else [rng.random() < 0.5 for _ in range(4)]
    row_weight = None if rng.random() < 0.5 else [rng.random() < 0.6 for _ in range(3)]
    heads = rng.choice([1, 1, 1, 2] if interpreted else [1, 2, 3])
    queries, keys = rng.choice(tokens + longer), rng.choice(tokens + longer)
    # What was added later is drawn from its own numbers, so that the rest of a seed's case stays as it was.
    later = random.Random(-1 - seed)
    shared = heads if later.random() < 0.6 else later.choice([part for part in (1, 2, heads) if heads % part == 0])
    lengths = None if later.random() < 0.6 else [later.randrange(keys + 1) for _ in range(maps)]
    return make_case(
        seed,
        maps=maps,
        map_index=[rng.randrange(maps) for _ in range(rows)],
        heads=heads,
        key_heads=shared,
        value_heads=later.choice([shared, heads]),
        key_lengths=lengths,
        queries=queries,
        keys=keys,
        head_dim=rng.choice([1, 4, 8, 16, 24, 40, 64, 72, 80, 160]),
        value_dim=rng.choice([None, None, 1, 3, 8, 33, 40, 80]),
        dtype=rng.choice(dtypes),
        device=device,
        layout=[rng.choice(list(LAYOUTS)) for _ in range(4)],
        bias=bias,
        masked=rng.choice([0.0, 0.2, 0.9]),
        scale=rng.choice([None, None, None, 0.0, -0.5, 1.0]),
        amplitude=rng.choice([0.1, 1.0, 1.0, 4.0]),
        row_weight=row_weight,
        unweighted=rng.choice([0.0, 0.3, 0.8, 1.0]),
    )


def check_seed(seed: int, backend: str, device: str) -> None:
    """Products, statistics and gradients of one case; an error names the command that repeats it."""
    # Half of the cases run in blocks that small shapes fill, so that the torch backend takes several.
    try:
        with pytest.MonkeyPatch.context() as patch:
            if seed % 2:
                cut_small_blocks(patch)
            check(random_case(seed, backend, device), backend, ROUTES[seed % 3])
    except Exception as error:
        command = f"FUZZ_SEED={seed} python -m pytest tests/kernels/test_fuzz.py -k 'one_seed and {backend}'"
        raise AssertionError(f"seed {seed} on {backend}: {error}\nrepeat with: {command}") from error


ROUTES = ("apply", "replay", "adjoint")
"""The op through which the gradients go."""


def check(case: Case, backend: str, route: str) -> None:
    """All results of ``case`` within the budget."""
    rest = (list(case.map_index), case.factor, backend)
    leaves = leaves_of(case)
    query, key, value, bias, weight, row_weight = (
        leaves[name] for name in ("query", "key", "value", "bias", "weight", "row_weight")
    )
    with torch.no_grad():
        out, known = OPS.apply(query, key, value, bias, *rest, None, case.key_lengths)
        if row_weight is not None:
            out, _ = OPS.apply(query, key, value, bias, *rest, row_weight, case.key_lengths)
        replayed = OPS.replay(query, key, value, bias, known, *rest, row_weight, case.key_lengths)
        adjoint = OPS.adjoint(query, key, weight, bias, known, *rest, case.key_lengths)
    assert_matches(case, out=out, logsumexp=known, adjoint=adjoint)
    assert_matches(case, out=replayed)

    names = {"query": query, "key": key, "value": value, "bias": bias, "row_weight": row_weight}
    if route == "apply":
        result, seed = OPS.apply(query, key, value, bias, *rest, row_weight, case.key_lengths)[0], case.weight
    elif route == "replay":
        result, seed = OPS.replay(query, key, value, bias, known, *rest, row_weight, case.key_lengths), case.weight
    else:
        # ⟨A.T (r ⊙ w), v⟩ = ⟨r ⊙ (A v), w⟩: the same numbers, and the gradient for w is the product.
        del names["value"], names["row_weight"]
        names["weight"] = weight
        rows = weight if case.row_weight is None else case.row_weight.unsqueeze(-1) * weight
        result = OPS.adjoint(query, key, rows, bias, known, *rest, case.key_lengths)
        seed = repeated(case.value, case.query.shape[1])
    wanted = {name: leaf for name, leaf in names.items() if leaf is not None}
    found = dict(zip(wanted, torch.autograd.grad(result, list(wanted.values()), seed), strict=True))
    if "weight" in found:
        assert_matches(case, out=found.pop("weight"))
    assert_matches(case, **{f"grad_{name}": grad for name, grad in found.items()})
