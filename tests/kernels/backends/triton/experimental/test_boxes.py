"""The forward through tensor descriptors: exact where it serves, and the pointer kernel where it cannot."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from fpe_kernels import AttentionMap, shared_attention
from fpe_kernels.backends.triton import configs, tuned
from fpe_kernels.backends.triton.experimental import boxes
from fpe_kernels.backends.triton.packing import Chunk
from fpe_kernels.testing import assert_within_budget, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[False, True], ids=["one kind of warp", "fetching warps"])
def described(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """Forward launches ask for descriptors; a list that gains an entry whenever they are served."""
    if request.param and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("warps that fetch need a copy engine")
    asked = configs.Config(64, 32, 4, 2, descriptors=True, specialised=request.param)
    served: list[str] = []
    prepare = boxes.prepare

    def counted(*arguments):
        served.append("descriptors")
        return prepare(*arguments)

    monkeypatch.setattr(configs, "apply_config", lambda *args: asked)
    monkeypatch.setattr(configs, "one_launch", lambda *args: False)
    monkeypatch.setattr(boxes, "prepare", counted)
    return served


def tensors(maps: int, rows: int, tokens: int, keys: int, dims: tuple[int, int], dtype: torch.dtype, layout: str):
    shapes = (maps, 2, tokens, dims[0]), (maps, 2, keys, dims[0]), (rows, 2, keys, dims[1])
    return [make(shape, seed, dtype, DEVICE, layout) for seed, shape in enumerate(shapes)]


def check(query, key, value, map_index, bias=None, **options) -> None:
    out = shared_attention(query, key, value, map_index, bias=bias, backend="triton", **options)
    plain = shared_attention(query, key, value, map_index, bias=bias, backend="reference", **options)
    wide = [None if tensor is None else tensor.double() for tensor in (query, key, value, bias)]
    exact = shared_attention(*wide[:3], map_index, bias=wide[3], backend="reference", **options)
    assert_within_budget(out, plain, exact, query.dtype)


@pytest.mark.parametrize(
    ("map_index", "tokens", "keys", "dims", "dtype"),
    [
        ((0, 0), 64, 64, (64, 64), torch.float16),  # whole tiles
        ((0, 0), 65, 41, (64, 64), torch.bfloat16),  # boxes that reach past both ends
        ((0, 1, 2, 2), 33, 7, (16, 32), torch.float16),  # several tables
        ((0, 0, 0, 0), 16, 100, (32, 16), torch.float16),
        ((0, 0, 0), 65, 65, (16, 16), torch.float16),
        ((0, 1, 0), 20, 33, (32, 32), torch.bfloat16),  # rows of a map that do not follow one another
        ((0,), 1, 1, (16, 16), torch.float16),
    ],
)
def test_products_through_descriptors(described, map_index, tokens, keys, dims, dtype) -> None:
    check(*tensors(max(map_index) + 1, len(map_index), tokens, keys, dims, dtype, "heads_split"), map_index)
    assert described


def test_the_statistics_that_it_leaves(described) -> None:
    query, key, value = tensors(1, 1, 20, 24, (32, 32), torch.float16, "heads_split")
    _, logsumexp = torch.ops.fpe_kernels.apply(query, key, value, None, [0], 0.2, "triton")
    assert described
    exact = AttentionMap(query.double(), key.double(), scale=0.2, backend="reference").logsumexp
    plain = AttentionMap(query.float(), key.float(), scale=0.2, backend="reference").logsumexp
    assert_within_budget(logsumexp, plain, exact, torch.float32)


@pytest.mark.parametrize(
    ("map_index", "dims", "layout", "options"),
    [
        ((0,) * 5, (32, 32), "heads_split", {}),  # more branches than a program holds
        ((0, 0), (40, 40), "heads_split", {}),
        ((0, 0), (8, 8), "heads_split", {}),
        ((0, 0), (32, 32), "misaligned", {}),
        ((0, 0), (32, 32), "channels_first", {}),
        ((0, 0), (32, 32), "heads_split", {"scale": -0.2}),
        ((0, 0), (32, 32), "heads_split", {"bias": torch.ones(1, 1, 1, 24, dtype=torch.float16)}),
    ],
)
def test_what_no_box_holds_takes_pointers(described, map_index, dims, layout, options) -> None:
    options = {name: option.to(DEVICE) if torch.is_tensor(option) else option for name, option in options.items()}
    check(*tensors(max(map_index) + 1, len(map_index), 20, 24, dims, torch.float16, layout), map_index, **options)
    assert not described


@pytest.mark.gpu
@pytest.mark.parametrize(("map_index", "dims"), [((0, 0, 1, 1), (64, 64)), ((0, 1), (128, 128)), ((0,) * 4, (64, 64))])
@pytest.mark.parametrize("tokens", [1024, 1023])
def test_tiles_of_real_size(map_index, dims, tokens, monkeypatch) -> None:
    rows = 128 if dims[0] * len(map_index) // (max(map_index) + 1) <= 128 else 64
    monkeypatch.setattr(configs, "apply_config", lambda *args: configs.Config(rows, 64, 8, 2, descriptors=True))
    check(*tensors(max(map_index) + 1, len(map_index), tokens, tokens, dims, torch.float16, "heads_split"), map_index)


def test_single_precision_takes_pointers() -> None:
    query, key, value = tensors(1, 1, 16, 16, (32, 32), torch.float32, "heads_split")
    assert not boxes.serves(query, key, value, Chunk(((0, 0),), 0, 32, True), 0.1)


def test_no_rule_chooses_what_only_the_tuner_can_judge(monkeypatch) -> None:
    monkeypatch.setattr(tuned, "FORWARD", {})
    configs.forward_config.cache_clear()
    for arch in configs.SHARED_MEMORY:
        for head_dim in (40, 64, 128, 160):
            config = configs.forward_config(arch, head_dim, 2 * head_dim, 2, False, 16, 4096)
            assert config == config.general() and not config.gluon
    configs.forward_config.cache_clear()


def test_what_no_box_holds_gets_warps_that_fetch_for_themselves() -> None:
    measured = configs.Config(128, 64, 4, 2, descriptors=True, specialised=True, maxnreg=168)
    assert measured.general() == configs.Config(128, 64, 8, 2)
    assert configs.Config(64, 64, 4, 2, maxnreg=168).general() == configs.Config(64, 64, 4, 2)
