"""Guards around every kernel test."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fpe_kernels import ops, ready


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN instead of as whatever memory held, so an element that is not written is seen."""
    heads, statistics = ops.empty_heads, ops.empty_logsumexp
    monkeypatch.setattr(ops, "empty_heads", lambda *args: heads(*args).fill_(float("nan")))
    monkeypatch.setattr(ops, "empty_logsumexp", lambda *args: statistics(*args).fill_(float("nan")))


@pytest.fixture(autouse=True)
def _nothing_is_ready() -> None:
    """A call that an earlier test left ready would pass by what this one replaces."""
    ready.forget()


def nearest_bfloat16(wide: np.ndarray) -> np.ndarray:
    """float32 as the bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(wide).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), nearest)


@pytest.fixture(autouse=True, scope="session")
def _interpreter_rounds_to_nearest() -> Iterator[None]:
    """Triton's interpreter cuts float32 off where it makes bfloat16; the hardware, and the error budget, round."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return nearest_bfloat16(data)
        return convert(data, source, target, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "costly: seconds through the Triton interpreter; left out there with slow ones")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out ``costly`` parameters of the Triton backend where it is interpreted and slow tests are left out."""
    if torch.cuda.is_available() or "not slow" not in config.getoption("-m"):
        return
    costly = [item for item in items if item.get_closest_marker("costly") and "TestTriton" in item.nodeid]
    if costly:
        config.hook.pytest_deselected(items=costly)
        items[:] = [item for item in items if item not in costly]
