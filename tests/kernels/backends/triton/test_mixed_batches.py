"""Batches whose maps have unequal numbers of rows, as one launch and as several: the same products either way."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from fpe_kernels import shared_attention
from fpe_kernels.backends.triton import configs
from fpe_kernels.backends.triton.apply import apply_kernel
from fpe_kernels.testing import assert_within_budget, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUIDED = (0, 1, 2, 2)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many branches each forward launch had."""
    from fpe_kernels.backends.triton import launch, plans

    counted: list[int] = []
    run = launch.Launch.run
    plans.forget()

    def counting(self):
        if self.kernel is apply_kernel:
            counted.append(self.constants["BRANCHES"])
        return run(self)

    monkeypatch.setattr(launch.Launch, "run", counting)
    return counted


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("map_index", "dims", "dtype", "options"),
    [
        (GUIDED, (40, 40), torch.float16, {}),  # two pieces of columns
        ((1, 0, 0, 2, 0), (16, 12), torch.bfloat16, {}),
        ((0, 1, 1, 1, 1), (16, 100), torch.float16, {}),  # two parts, the second with a known log-sum-exp
        (GUIDED, (16, 16), torch.float32, {"bias": True}),
        (GUIDED, (16, 16), torch.float16, {"weight": True}),  # tiles without a weight read no key
    ],
)
def test_both_ways_are_exact(together, map_index, dims, dtype, options, monkeypatch, launches) -> None:
    monkeypatch.setattr(configs, "one_launch", lambda *arguments: together)
    maps, rows = max(map_index) + 1, len(map_index)
    tensors = [
        make(shape, seed, dtype, DEVICE, "heads_split")
        for seed, shape in enumerate([(maps, 2, 37, dims[0]), (maps, 2, 23, dims[0]), (rows, 2, 23, dims[1])])
    ]
    extra = {}
    if "bias" in options:
        extra["bias"] = make((1, 2, 37, 23), 7, dtype, DEVICE)
    if "weight" in options:
        weight = torch.rand(rows, 1, 37, device=DEVICE).to(dtype)
        weight[:, :, :20] = 0
        extra["weight"] = weight

    def product(tensors, extra, backend):
        return shared_attention(*tensors, map_index, **extra, backend=backend)

    out = product(tensors, extra, "triton")
    wide = [tensor.double() for tensor in tensors], {name: tensor.double() for name, tensor in extra.items()}
    assert_within_budget(out, product(tensors, extra, "reference"), product(*wide, "reference"), dtype)
    assert len(set(launches)) == (1 if together else 2)


def test_the_rule_fills_waves_and_computes_no_wave_more() -> None:
    def joins(tokens: int, map_index=GUIDED, heads: int = 8) -> bool:
        return configs.joins("sm_90", map_index, heads, tokens, 64, 64, 2, False)

    assert joins(64) and joins(256)  # everything at once leaves multiprocessors idle
    assert not joins(4096) and not joins(16384)  # full waves: unasked columns would cost their work
    assert not joins(64, map_index=(0, 0, 1, 1))  # one launch already
    assert not joins(64, map_index=())


def test_a_measured_table_overrules_the_rules(monkeypatch) -> None:
    from fpe_kernels.backends.triton import tuned

    configs.joins.cache_clear()
    configs.forward_config.cache_clear()
    monkeypatch.setattr(tuned, "TOGETHER", {("sm_90", 64, 128, 4096): True})
    monkeypatch.setattr(tuned, "FORWARD", {("sm_90", 64, 128, 4096): (64, 128, 4, 2, False, False, 168)})
    try:
        assert configs.joins("sm_90", GUIDED, 8, 5000, 64, 64, 2, False)
        assert configs.forward_config("sm_90", 64, 128, 2, False, 8, 3000) == configs.Config(64, 128, 4, 2, maxnreg=168)
        # A prompt has too few keys for what was measured with many.
        assert configs.forward_config("sm_90", 64, 128, 2, False, 8, 3000, 77).maxnreg == 0
        for itemsize, bias, tokens in ((4, False, 4096), (2, True, 4096), (2, False, 1024)):
            rules = configs.product_config("sm_90", 64, 128, itemsize, bias)
            assert configs.forward_config("sm_90", 64, 128, itemsize, bias, 64, tokens) == rules
    finally:
        configs.joins.cache_clear()
        configs.forward_config.cache_clear()


@pytest.mark.parametrize(("tokens", "length"), [(1, 256), (512, 256), (513, 1024), (4096, 4096), (10**6, 16384)])
def test_length_classes_are_the_nearest_by_ratio(tokens: int, length: int) -> None:
    assert configs.length_class(tokens) == length
