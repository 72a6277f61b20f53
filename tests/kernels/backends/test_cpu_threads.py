"""Threads that take whole blocks: each computes alone, nobody else's settings change, and errors come back."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fpe_kernels import AttentionMap, shared_attention
from fpe_kernels.backends import cpu_threads
from fpe_kernels.testing import make_case


def in_two_threads(code: str) -> str:
    """The output of a process with two threads, whatever the tests themselves have."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_thread_inside_computes_alone_and_others_keep_their_number() -> None:
    out = in_two_threads(
        "import torch, threading\n"
        "from fpe_kernels.backends import cpu_threads\n"
        "seen = []\n"
        "def task():\n"
        "    seen.append((torch.get_num_threads(), threading.get_ident(), cpu_threads.lane()))\n"
        "    torch.mm(torch.randn(300, 300), torch.randn(300, 300))\n"
        "cpu_threads.share_out([task] * 200)\n"
        "later = []\n"
        "thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))\n"
        "thread.start(); thread.join()\n"
        "numbers = {n for n, _, _ in seen}\n"
        "print(cpu_threads.threads_compute_alone(), numbers, len(seen), torch.get_num_threads(), later)\n"
    )
    assert out.split(" ", 1)[0] in ("True", "False")
    if out.startswith("True"):
        assert out == "True {1} 200 2 [2]\n"
    else:  # a PyTorch whose libraries cannot be asked
        assert out == "False {2} 200 2 [2]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what is mapped, under names of any bytes")
def test_a_mapped_file_whose_name_is_not_utf_8_is_passed_over(tmp_path: Path) -> None:
    before = cpu_threads._settings.__wrapped__()
    with open(os.fsencode(tmp_path) + b"/caf\xe9", "w+b") as file:
        file.write(b"\0" * mmap.PAGESIZE)
        file.flush()
        with mmap.mmap(file.fileno(), mmap.PAGESIZE):
            assert (cpu_threads._settings.__wrapped__() is None) == (before is None)


def test_what_a_task_raises_comes_back_and_the_next_call_works(two_threads) -> None:
    def fail() -> None:
        raise ValueError("no such block")

    done: list[int] = []
    with pytest.raises(ValueError, match="no such block"):
        cpu_threads.share_out([fail, *[lambda: done.append(1)] * 50])
    cpu_threads.share_out([lambda: done.append(2)] * 3)
    assert done.count(2) == 3


def team_settings() -> Any:
    settings = cpu_threads._settings()
    if settings is None or settings.team is None:
        pytest.skip("the OpenMP of this PyTorch does not lend its threads")
    return settings


def test_what_any_thread_of_the_team_raises_comes_back(two_threads) -> None:
    settings = team_settings()
    both = threading.Barrier(2)
    for failing in (0, 1):

        def task(failing: int = failing) -> None:
            both.wait(timeout=60.0)
            if cpu_threads.lane() == failing:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cpu_threads._by_team([task, task], 2, False, settings)
        assert cpu_threads.lane() == 0 and torch.get_num_threads() == 2


def test_a_task_that_no_thread_of_the_team_has_ended_is_not_passed_over(two_threads) -> None:
    settings = team_settings()
    done: list[int] = []
    tasks = [lambda: done.append(1)] * 3
    nobody = replace(settings, team=lambda *arguments: None)
    cpu_threads._by_team(tasks, 2, False, nobody)
    assert len(done) == 3

    def lost(queue, *arguments) -> None:
        queue.popleft()  # as by a thread that an interrupt took out of its task, and a second one out of its report

    original, cpu_threads._work = cpu_threads._work, lost
    try:
        with pytest.raises(KeyboardInterrupt):
            cpu_threads._by_team(tasks, 2, False, settings)
    finally:
        cpu_threads._work = original


@pytest.mark.parametrize("lent", [True, False], ids=["team", "workers"])
def test_threads_of_openmp_and_our_own_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, two_threads, lent: bool
) -> None:
    settings = team_settings()
    case = make_case(map_index=(0, 0), heads=4, queries=600, keys=1100, head_dim=40)
    call = lambda: shared_attention(case.query, case.key, case.value, (0, 0), backend="torch")  # noqa: E731
    expected = call()
    if not lent:
        monkeypatch.setattr(cpu_threads, "_settings", lambda: replace(settings, team=None))
    names: set[str] = set()
    take = cpu_threads._take

    def seen(*arguments) -> None:
        names.add(threading.current_thread().name)
        take(*arguments)

    monkeypatch.setattr(cpu_threads, "_take", seen)
    assert torch.equal(call(), expected)
    assert any(name.startswith("fpe_kernels") for name in names) != lent


def test_a_failure_while_a_mode_watches_leaves_the_thread_in_its_own_lane(two_threads) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def fail() -> None:
        raise ValueError("no such block")

    with Watching(), pytest.raises(ValueError, match="no such block"):
        cpu_threads.share_out([lambda: None, fail])
    assert cpu_threads.lane() == 0


def test_the_same_call_gives_the_same_bits_whichever_thread_takes_a_block() -> None:
    code = (
        "import torch; from fpe_kernels import shared_attention; from fpe_kernels.testing import make_case\n"
        "from fpe_kernels.backends import cpu_threads\n"
        "case = make_case(map_index=(0, 0), heads=3, queries=700, keys=1100, head_dim=40)\n"
        "out = [shared_attention(case.query, case.key, case.value, (0, 0), backend='torch') for _ in range(3)]\n"
        "print(cpu_threads.threads_compute_alone(), all(torch.equal(out[0], other) for other in out))"
    )
    alone, same = in_two_threads(code).split()
    if alone != "True":
        pytest.skip("this PyTorch does not let threads compute alone")
    assert same == "True"


def test_inference_mode_and_leaves_that_want_gradients(two_threads) -> None:
    case = make_case(map_index=(0, 0), heads=4, queries=600, keys=600, head_dim=40)
    with torch.inference_mode():
        out = shared_attention(case.query.clone(), case.key.clone(), case.value.clone(), (0, 0), backend="torch")
        assert out.is_inference()
    leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value)]
    shared_attention(leaves[0], leaves[1], leaves[2], (0, 0), backend="torch").sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.requires_grad for leaf in leaves)
    torch.testing.assert_close(out, torch.softmax(case.factor * case.query @ case.key.mT, -1) @ case.value)


def test_several_callers_at_the_same_time(two_threads) -> None:
    case = make_case(map_index=(0, 0), heads=4, queries=600, keys=600, head_dim=40)
    expected = shared_attention(case.query, case.key, case.value, (0, 0), backend="torch")
    found: list[torch.Tensor] = []

    def call() -> None:
        found.append(shared_attention(case.query, case.key, case.value, (0, 0), backend="torch"))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for out in found:
        torch.testing.assert_close(out, expected)


def test_a_profiler_sees_the_memory_of_every_lane(two_threads) -> None:
    from benchmarks.memory import peak_bytes

    case = make_case(map_index=(0, 0), heads=4, queries=1024, keys=1024, head_dim=40)
    operator = AttentionMap(case.query, case.key, backend="torch")
    peak = peak_bytes(lambda: operator @ (case.value[:1], case.value[1:]))
    block = 512 * 1024 * 4  # bytes of scores that a thread holds
    if cpu_threads.threads_compute_alone():
        assert peak > 2 * block


def test_a_forked_process_has_threads_of_its_own() -> None:
    out = in_two_threads(
        "import os, torch\n"
        "from fpe_kernels import shared_attention\n"
        "from fpe_kernels.testing import make_case\n"
        "case = make_case(map_index=(0, 0), heads=4, queries=600, keys=600, head_dim=40)\n"
        "call = lambda: shared_attention(case.query, case.key, case.value, (0, 0), backend='torch')\n"
        "call()\n"
        "torch.set_num_threads(1)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    call(); os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    assert out == "0\n"


@pytest.mark.slow
def test_a_forked_process_does_not_wait_for_the_openmp_threads_of_its_parent() -> None:
    out = in_two_threads(
        "import os, signal\n"
        "from fpe_kernels.backends import cpu_threads\n"
        "done = []\n"
        "call = lambda: cpu_threads.share_out([lambda: done.append(1)] * 8)\n"
        "call()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(60); call(); os._exit(len(done))\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert out == "16\n"
