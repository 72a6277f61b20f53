"""The kernel for Hopper on a device that has it: exact where it serves, at every width, the same bits every time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from fpe_kernels import AttentionMap, shared_attention
from fpe_kernels.backends.triton import configs, hopper
from fpe_kernels.testing import assert_matches, make_case

pytestmark = pytest.mark.gpu


@pytest.fixture(
    params=[(128, 128, 2), (128, 64, 3), (64, 32, 2), (192, 64, 2), (256, 64, 3), (256, 32, 4)],
    ids=str,
)
def served(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Forward launches ask for the kernel; a list that gains the branches of every launch that it serves."""
    if torch.cuda.get_device_capability() != (9, 0) or isinstance(hopper.kernels(), str):
        pytest.skip("needs Hopper, and a Triton with Gluon")
    rows, keys, stages = request.param
    asked = configs.Config(rows, keys, 4, stages, gluon=True)
    branches: list[int] = []
    prepare = hopper.prepare

    def counted(*arguments):
        branches.append(arguments[3].branches)
        return prepare(*arguments)

    monkeypatch.setattr(configs, "apply_config", lambda *arguments: asked)
    monkeypatch.setattr(hopper, "prepare", counted)
    return branches


def fits(served_with: configs.Config, head_dim: int) -> bool:
    return hopper.most_branches(head_dim, head_dim, served_with) > 0


PAIR = (0, 0), 333, 777
OTHERS = [
    ((0,), 64, 128),
    ((1, 0, 1, 0), 129, 300),  # rows that are not one after the other
    ((0, 1, 2, 2), 65, 7),  # keys of less than a tile
    ((0, 0, 0, 0, 0), 256, 1000),  # more branches than some launches hold
]
# Every one is two programs to compile for each of the tiles: every width with a pair, two with what else there is.
PRODUCTS = [
    *((width, *PAIR, torch.float16) for width in (16, 32, 40, 64, 72, 80, 96, 128, 160)),
    *((width, *other, torch.float16) for width in (40, 128) for other in OTHERS),
    *((width, *PAIR, torch.bfloat16) for width in (40, 160)),
]


@pytest.mark.parametrize(("head_dim", "map_index", "queries", "keys", "dtype"), PRODUCTS, ids=str)
def test_products_are_exact(served, head_dim, map_index, queries, keys, dtype) -> None:
    if not fits(configs.apply_config(), head_dim):
        pytest.skip("the tiles do not fit at this width")
    case = make_case(
        maps=1 + max(map_index), map_index=map_index, queries=queries, keys=keys, head_dim=head_dim, dtype=dtype,
        device="cuda", layout="heads_split",
    )  # fmt: skip
    arguments = case.query, case.key, case.value, None, list(map_index), case.factor, "triton"
    out, logsumexp = torch.ops.fpe_kernels.apply(*arguments)
    assert sum(served) >= max(Counter(map_index).values())  # maps with fewer rows may share a launch
    assert_matches(case, out=out, logsumexp=logsumexp)
    replayed = torch.ops.fpe_kernels.replay(*arguments[:4], logsumexp, *arguments[4:])
    assert_matches(case, out=replayed)


def test_the_same_bits_again_and_again(served) -> None:
    case = make_case(
        map_index=(0, 0), heads=4, queries=1000, keys=1000, head_dim=64, dtype=torch.float16, device="cuda"
    )
    call = lambda: shared_attention(case.query, case.key, case.value, (0, 0), backend="triton")  # noqa: E731
    first = call()
    assert served
    assert all(torch.equal(first, call()) for _ in range(100))


def test_a_recorded_map_is_replayed_and_captured_in_a_graph(served) -> None:
    case = make_case(map_index=(0, 0), queries=512, keys=512, head_dim=64, dtype=torch.float16, device="cuda")
    recorded = AttentionMap(case.query, case.key, scale=case.factor, backend="triton")
    expected = recorded @ case.value[:1]
    assert served
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = recorded @ case.value[:1]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
