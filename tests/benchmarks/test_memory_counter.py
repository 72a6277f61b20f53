"""The peak-memory counter against arithmetic, and against the resident set of a fresh process."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from benchmarks.memory import peak_bytes

MB = 1_000_000


def floats(megabytes: int) -> torch.Tensor:
    return torch.zeros(megabytes * MB // 4)


def test_the_peak_is_the_most_held_at_once():
    def call():
        first = floats(8)
        second = floats(4)
        del first
        third = floats(2)
        return second, third

    assert peak_bytes(call) == pytest.approx(12 * MB, rel=0.01)


def test_what_was_held_before_does_not_count():
    before = floats(16)
    assert peak_bytes(lambda: before.add_(1)) < 0.1 * MB


def test_buffers_inside_an_operator_count():
    """logsumexp makes exp(x − max) for itself and gives it back before it returns."""
    x = torch.randn(1000, 1000)
    assert peak_bytes(lambda: torch.logsumexp(x, -1)) >= 4 * MB


def test_the_same_number_every_time():
    q = torch.randn(1, 2, 512, 16)

    def call():
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    call()
    assert len({peak_bytes(call) for _ in range(3)}) == 1


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM from /proc")
def test_it_agrees_with_the_resident_set_of_a_fresh_process():
    script = """
        import re
        import torch
        from benchmarks.memory import peak_bytes

        def status(name):
            return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))

        torch.set_num_threads(1)
        q = torch.randn(1, 4, 2048, 32)
        def call():
            return torch.softmax(q @ q.mT, -1) @ q
        small = q[:, :, :64]
        torch.softmax(small @ small.mT, -1) @ small    # loads what is loaded once
        before = status("VmRSS")
        call()
        print(status("VmHWM") - before, peak_bytes(call))
    """
    # Without this the C library keeps freed blocks, and the resident set never falls.
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", textwrap.dedent(script)]
    finished = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    resident, counted = map(int, finished.stdout.split()[-2:])
    assert counted == pytest.approx(resident, rel=0.1)
