"""What every test shares: where the Triton kernels run, the backends with their devices, and seeds."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from tests.support.long_cases import listed

HAS_CUDA = torch.cuda.is_available()
LONG = listed()

# Kernels are decorated for the interpreter or for the compiler once, when they are imported: this decides before that.
# Tests that need the compiler start a process of their own.
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

# Tests are many small tensors, for which threads wait longer than they compute: one, unless the caller says otherwise.
torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1").partition(",")[0])))


def pytest_report_header() -> str:
    """What decides how sums are rounded: results of two runs are comparable to the bit where these lines agree."""
    limits = [
        f"{name}={os.environ[name]}" for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if name in os.environ
    ]
    cpu = " ".join([torch.backends.cpu.get_cpu_capability(), *limits])
    return f"torch {torch.__version__}, CPU capability {cpu}, {torch.get_num_threads()} threads, CUDA {HAS_CUDA}"


def pytest_collection_finish() -> None:
    """What was imported for all tests stays until the last: no garbage collection has to look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def answered_signals() -> Iterator[None]:
    """Signals do what they do in a terminal, here and in processes that are started, even where whoever started the
    tests has them ignored: a script in the background (``make test &``), ``nohup``."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, answer in before.items():
            signal.signal(number, answer)


@dataclass(frozen=True)
class Backend:
    """A backend and the device on which it is tested."""

    name: str
    device: str


BACKENDS = {
    "reference": Backend("reference", "cpu"),
    "torch": Backend("torch", "cpu"),
    "triton": Backend("triton", "cuda" if HAS_CUDA else "cpu"),
}


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend in turn; ``triton`` on CUDA where there is one, else through the interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return BACKENDS[request.param]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before marks select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests where there is no CUDA device; mark the cases that are listed as long ones slow."""
    for item in items:
        if item.nodeid in LONG:
            item.add_marker(pytest.mark.slow)
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
