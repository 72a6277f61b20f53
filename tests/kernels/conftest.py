"""Guards around every kernel test."""

from __future__ import annotations

import pytest
import torch

from fpe_kernels import ops


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN instead of as whatever memory held, so an element that is not written is seen."""
    heads, statistics = ops.empty_heads, ops.empty_logsumexp
    monkeypatch.setattr(ops, "empty_heads", lambda *args: heads(*args).fill_(float("nan")))
    monkeypatch.setattr(ops, "empty_logsumexp", lambda *args: statistics(*args).fill_(float("nan")))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "costly: seconds through the Triton interpreter; left out there by default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out ``costly`` parameters of the Triton backend where it is interpreted, unless ``-m`` names them."""
    if torch.cuda.is_available() or "costly" in config.getoption("-m"):
        return
    costly = [item for item in items if item.get_closest_marker("costly") and "TestTriton" in item.nodeid]
    if costly:
        config.hook.pytest_deselected(items=costly)
        items[:] = [item for item in items if item not in costly]
