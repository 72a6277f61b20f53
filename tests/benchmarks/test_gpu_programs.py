"""Programs compiled ahead for a chip that is not here, and the committed figure of how long that takes."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import checks
from benchmarks.gpu.figures import FIGURE
from benchmarks.workers.problems import GRADIENTS, Problem, check

CORES, SECONDS = 16, 100  # of a machine with a GPU, and what compiling may take of the smoke run


def compiler(code: str, cache: str = "") -> str:
    """The output of a process whose kernels are decorated for the compiler."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if cache:
        environment["TRITON_CACHE_DIR"] = cache
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_the_smoke_list_compiles_in_time_under_the_triton_of_the_gpu_machine():
    figure = FIGURE.read()["smoke/sm_90/triton 3.6.0"]
    assert figure["seconds"] / CORES < SECONDS
    listed = compiler(
        "from benchmarks.gpu import checks\nfrom benchmarks.workers import programs\n"
        "subjects = [*checks.smoke_problems(), *((case, None) for case in checks.headline_cases())]\n"
        "print(len(programs.tasks_for(subjects, 'sm_90')))"
    )
    assert int(listed) == figure["programs"], "the list has changed: python -m benchmarks.gpu programs --update"


def test_the_smoke_list_has_every_kernel_dtype_and_head_dim():
    problems = checks.smoke_problems()
    whole = {(p.head_dim, p.dtype) for p in problems if p.results == "all"}
    assert {(d, dtype) for d in checks.HEAD_DIMS for dtype in ("float16", "bfloat16", "float32")} <= whole
    assert {p.results for p in problems} == {"forward", "replay", "all"}
    assert any(p.row_weight for p in problems)
    assert {p.bias for p in problems} >= {None, checks.EVERY_SCORE, checks.PADDING}
    assert len({p.name for p in problems}) == len(problems)


def test_the_full_list_repeats_nothing():
    names = [p.name for p in checks.full_problems()]
    assert len(set(names)) == len(names)
    assert not set(names) & {p.name for p in checks.smoke_problems()}


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_a_second_process_finds(tmp_path):
    code = (
        "import json; from benchmarks.workers import programs; from benchmarks.workers.problems import Problem\n"
        "problem = Problem((0, 0), 333, 517, 40)\n"
        "seconds = [programs.compile_launch(launch, 'sm_90') for launch in problem.launches('sm_90')]\n"
        "print(json.dumps(seconds))"
    )
    first, second = (json.loads(compiler(code, str(tmp_path))) for _ in range(2))
    assert sum(second) < 0.5 * sum(first)


@pytest.mark.parametrize("results", ["forward", "replay", "all"])
def test_a_problem_agrees_on_the_cpu(results):
    found = check(Problem((0, 1), 33, 65, 16, "float32", results=results), "cpu", "torch")
    assert 0 < found["error"] < 1e-4


def test_a_wrong_gradient_is_found(monkeypatch):
    import torch

    real = torch.autograd.grad

    def spoiled(*args, **keywords):
        grads = real(*args, **keywords)
        grads[GRADIENTS.index("grad_key")][0, 0, 0, 0] += 1e-2
        return grads

    monkeypatch.setattr(torch.autograd, "grad", spoiled)
    with pytest.raises(AssertionError, match="grad_key: error 1"):
        check(Problem((0, 0), 33, 65, 16, "float32", results="all"), "cpu", "torch")


@pytest.mark.slow
def test_the_measured_kernel_serves_what_was_measured_and_no_output_in_float32():
    kernels = compiler(
        "import torch\n"
        "from benchmarks.workers.problems import launches_of\n"
        "from fpe_kernels.backends.protocol import Maps\n"
        "from fpe_kernels.backends.triton import forward\n"
        "from fpe_kernels.ops import empty_heads, empty_logsumexp\n"
        "like = torch.empty(0, dtype=torch.float16, device='meta')\n"
        "query, value = empty_heads(like, 1, 8, 4096, 64), empty_heads(like, 2, 8, 4096, 64)\n"
        "for dtype in (torch.float16, torch.float32):\n"
        "    with launches_of('sm_90') as made:\n"
        "        out = empty_heads(like, 2, 8, 4096, 64, dtype)\n"
        "        forward.apply(Maps(query, query, None, (0, 0), 0.1), value, out, empty_logsumexp(query), False)\n"
        "    print(*[launch.kernel.__name__ for launch in made])"
    )
    assert kernels.split() == ["hopper_kernel", "apply_kernel"]
