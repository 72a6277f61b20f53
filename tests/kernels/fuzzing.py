"""Random cases: everything about a case follows from its seed, so one number repeats a failure."""

from __future__ import annotations

import random
from unittest import mock

import torch
from contract import SMALL_BLOCKS
from contract_gradients import leaves_of

from fpe_kernels.backends import chunked
from fpe_kernels.testing import LAYOUTS, Case, assert_matches, make_case


def random_case(seed: int, backend: str, device: str) -> Case:
    """The case of ``seed``: shapes, layouts, dtype, shared maps, bias, scale."""
    rng = random.Random(seed)
    interpreted = backend == "triton" and device == "cpu"
    dtypes = [torch.float32, torch.float16, torch.bfloat16] + ([] if backend == "triton" else [torch.float64])
    tokens = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65]
    longer = [] if interpreted else [100, 127, 129, 200, 257]
    tokens = rng.choice([tokens[:-2], tokens]) if interpreted else tokens  # a second tile costs as much as the first
    maps = rng.choice([1, 1, 1, 1, 2] if interpreted else [1, 1, 2, 3, 4])
    rows = rng.choice([1, 2, 2, 3] if interpreted else [1, 2, 3, 4, 6])
    bias = None if rng.random() < 0.4 else [rng.random() < 0.5 for _ in range(4)]
    return make_case(
        seed,
        maps=maps,
        map_index=[rng.randrange(maps) for _ in range(rows)],
        heads=rng.choice([1, 1, 1, 2] if interpreted else [1, 2, 3]),
        queries=rng.choice(tokens + longer),
        keys=rng.choice(tokens + longer),
        head_dim=rng.choice([1, 4, 8, 16, 24, 40, 64, 72, 80, 160]),
        value_dim=rng.choice([None, None, 1, 3, 8, 33, 40, 80]),
        dtype=rng.choice(dtypes),
        device=device,
        layout=[rng.choice(list(LAYOUTS)) for _ in range(4)],
        bias=bias,
        masked=rng.choice([0.0, 0.2, 0.9]),
        scale=rng.choice([None, None, None, 0.0, -0.5, 1.0]),
        amplitude=rng.choice([0.1, 1.0, 1.0, 4.0]),
    )


def check_seed(seed: int, backend: str, device: str) -> None:
    """Product, replay, adjoint and gradients of one case; an error names the command that repeats it."""
    # Half of the cases run in blocks that small shapes fill, so that the torch backend takes several.
    blocks = SMALL_BLOCKS if seed % 2 else {name: getattr(chunked, name) for name in SMALL_BLOCKS}
    try:
        # An interpreted gradient takes as long as all the rest, so there only every third case has one.
        with mock.patch.multiple(chunked, **blocks):
            check(random_case(seed, backend, device), backend, backend != "triton" or device != "cpu" or seed % 3 == 0)
    except Exception as error:
        command = f"FUZZ_SEED={seed} python -m pytest tests/kernels/test_fuzz.py -k 'one_seed and {backend}'"
        raise AssertionError(f"seed {seed} on {backend}: {error}\nrepeat with: {command}") from error


def check(case: Case, backend: str, gradients: bool) -> None:
    """All results of ``case`` within the budget."""
    rest = (list(case.map_index), case.factor, backend)
    leaves = leaves_of(case)
    names = [name for name in ("query", "key", "value", "bias") if leaves[name] is not None]
    query, key, value, bias = (leaves[name] for name in ("query", "key", "value", "bias"))
    out, logsumexp = torch.ops.fpe_kernels.apply(query, key, value, bias, *rest)
    known = logsumexp.detach()
    replayed = torch.ops.fpe_kernels.replay(case.query, case.key, case.value, case.bias, known, *rest)
    adjoint = torch.ops.fpe_kernels.adjoint(case.query, case.key, case.weight, case.bias, known, *rest)
    assert_matches(case, out=out.detach(), logsumexp=known, adjoint=adjoint)
    assert_matches(case, out=replayed)
    if gradients:
        found = torch.autograd.grad(out, [leaves[name] for name in names], case.weight)
        assert_matches(case, **{f"grad_{name}": grad for name, grad in zip(names, found, strict=True)})
