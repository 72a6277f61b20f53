"""The stages of a session, each as it runs in its own process: from a context to findings that it says as they come."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ..rows import ROOT
from ..workers.pool import STARTUP, Outcome, Task, resolve, share_out
from . import measuring
from .context import Context
from .records import say

CHECK_LIMIT = 25.0  # seconds for one check with a compilation or two in it
NOTHING_COLLECTED = 5  # pytest's exit status for it
OLDEST = (8, 0)  # compute capability that the Triton kernels need


@dataclass(frozen=True)
class Stage:
    """`share` of the session's time, `least` seconds all the same; `needs` are modules without which it is skipped.

    `call` is "package.module:function", a function of a :class:`Context`.
    """

    name: str
    share: float
    call: str
    needs: tuple[str, ...] = ()
    least: float = 0.0


def environment(context: Context) -> None:
    """The device, driver, versions and commit; which backends serve, and what it costs where kernels do not."""
    import torch

    from fpe_kernels import backends

    from ..rows import Environment

    say("note", text=str(Environment.read(context.device)))
    served = backends()
    say("note", text=f"backends: {served}")
    if context.device == "cuda":
        say("note", text=str(torch.cuda.get_device_properties(0)))
        say("note", text=_output(["nvidia-smi"]))
        if torch.cuda.get_device_capability() < OLDEST:
            say("note", text=_too_old(torch.cuda.get_device_capability(), served["triton"]))


def _too_old(capability: tuple[int, int], reason: str) -> str:
    chip = ".".join(map(str, capability))
    return (
        f"This chip has compute capability {chip}; the Triton backend does not serve it ({reason}). "
        "The torch backend does: exact, in bounded memory, as blocks of matrix products, which take longer than a "
        "fused kernel. Stages that measure kernels measure the torch backend."
    )


def programs(context: Context) -> None:
    """Compile ahead what the other stages launch."""
    from ..workers.programs import COMPILE_LIMIT, compile_ahead, tasks_for, timed_subjects, worker_count
    from .checks import full_problems, headline_cases, smoke_problems

    arch = _architecture(context)
    kind = context.option("session", "smoke")
    subjects: list[Any] = [*smoke_problems(arch), *((case, None) for case in headline_cases())]
    if kind == "full":
        subjects = [*timed_subjects(arch), *([] if context.option("unchecked", "") else full_problems())]
    listed = [*([] if context.dry else tasks_for(subjects, arch)), *_planted(context, "plant-programs")]
    limit = float(context.option("check-limit", str(COMPILE_LIMIT)))
    count, seconds = 0, 0.0
    for task, took, problem in compile_ahead(listed, worker_count(), limit, context.left):
        count, seconds = count + 1, seconds + took
        if problem:
            say("failure", what=f"compiling {task.name}", why=problem)
    say("note", text=f"{count} programs compiled in {seconds:.0f} s of processor time")


def smoke_checks(context: Context) -> None:
    from .checks import launch_tasks, smoke_problems, tasks

    launched = launch_tasks(context.device, context.backend, _devices())
    _check(
        context,
        [*(launched[:2] if context.dry else launched), *tasks(*_for(context, smoke_problems(_architecture(context))))],
    )


def full_checks(context: Context) -> None:
    from .checks import full_problems, tasks

    _check(context, tasks(*_for(context, full_problems())))


def _for(context: Context, problems: list) -> tuple[list, str, str]:
    if context.dry:
        problems = [p for p in problems if p.dtype == "float32" and p.queries * p.keys < 2**18 and not p.choice][:3]
    return problems, context.device, context.backend


def _check(context: Context, tasks: Sequence[Task]) -> None:
    """Share checks out over workers; each is named when it begins, and its verdict said when it ends."""
    from ..workers.programs import worker_count

    workers = 2 if context.dry else worker_count(14)
    limit = float(context.option("check-limit", str(CHECK_LIMIT)))
    skipped: list[str] = []
    for outcome in share_out(
        [*tasks, *_planted(context, "plant")],
        workers,
        limit,
        startup=float(context.option("startup", str(STARTUP))),
        setup="benchmarks.gpu.checks:one_thread",
        time_left=context.left,
        began=lambda task: say("begin", what=task.name),
    ):
        skipped += [outcome.task.name] if outcome.skipped else []
        _say_outcome(outcome)
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        say("failure", what="; ".join(skipped[:5]) + more, why="no time was left")


def _say_outcome(outcome: Outcome) -> None:
    name = outcome.task.name
    say("end", what=name)
    if outcome.skipped:
        return
    found = {"ok": not outcome.problem, "seconds": round(outcome.seconds, 2), **(outcome.value or {})}
    say("check", what=name, **found, **({"problem": outcome.problem} if outcome.problem else {}))
    if outcome.problem:
        say("failure", what=name, why=outcome.problem)


def _planted(context: Context, option: str) -> list[Task]:
    """Faults that a test plants: "name=module:function" for each."""
    planted = context.option(option, "")
    return [Task(name, call) for name, _, call in (entry.partition("=") for entry in planted.split(",")) if call]


def device_tests(context: Context) -> None:
    """The tests marked `gpu`; every outcome is said by name as it comes."""
    from ..workers.programs import worker_count

    paths = _files_with_gpu_tests()
    if not _has("diffusers"):
        paths = [path for path in paths if "pipeline" not in path]
    selected = ["-m", "gpu", *paths]
    if context.dry:
        selected = ["-m", "not gpu and not slow", "tests/benchmarks/test_rows.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.gpu.tests_said",
        *selected,
    ]
    if _has("xdist") and not context.dry:
        command += ["-n", str(worker_count(14))]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if status not in (0, 1, NOTHING_COLLECTED):  # 1: failures, each of which has been said
        say("failure", what="pytest -m gpu", why=f"exit status {status}")


def _files_with_gpu_tests() -> list[str]:
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]


def train(context: Context) -> None:
    from .training import train_models

    train_models(context)


def _architecture(context: Context) -> str:
    import torch

    from fpe_kernels.backends.triton.chips import architecture

    return architecture(torch.device(context.device))


def _devices() -> int:
    import torch

    return torch.cuda.device_count()


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"


def _stage(name: str, share: float, function: Callable[[Context], None], *needs: str, least: float = 0.0) -> Stage:
    return Stage(name, share, f"{function.__module__}:{function.__name__}", needs, least)


SMOKE = (
    _stage("environment", 0.05, environment, least=15.0),
    _stage("programs", 0.31, programs, "triton"),
    _stage("checks", 0.24, smoke_checks),
    _stage("ratios", 0.22, measuring.ratios),
    _stage("step", 0.18, measuring.edited_step, "diffusers"),
)
FULL = (
    _stage("environment", 0.02, environment, least=15.0),
    _stage("programs", 0.12, programs, "triton"),
    _stage("checks", 0.07, full_checks),
    _stage("roofline", 0.02, measuring.roofline, least=10.0),
    _stage("tuning", 0.17, measuring.tuning),
    _stage("launches", 0.03, measuring.launches),
    _stage("kernels", 0.13, measuring.kernels),
    _stage("edits", 0.12, measuring.edits, "diffusers"),
    _stage("transformers", 0.05, measuring.transformers, "diffusers"),
    _stage("recordings", 0.03, measuring.recordings, "diffusers"),
    _stage("memory", 0.02, measuring.memory),
    _stage("compiled", 0.15, measuring.compiled, "diffusers"),
    _stage("tests", 0.07, device_tests, "pytest"),
)
TUNING = ("tuning", "launches")  # after which a session may take over what was found
TRAIN = (
    _stage("environment", 0.02, environment, least=15.0),
    _stage("train", 0.98, train, "diffusers", "tokenizers"),
)
SESSIONS: dict[str, tuple[Stage, ...]] = {"smoke": SMOKE, "full": FULL, "train": TRAIN}


def _read_the_table_again() -> None:
    """What this process is forked from has imported the table of before."""
    from fpe_kernels.backends.triton import tuned

    importlib.reload(tuned)


def run_stage(call: str, context: Context, output: Connection) -> None:
    """In a process of its own: what the stage prints goes to `output`, line by line."""
    os.setsid()
    os.dup2(output.fileno(), 1)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  it stays open as long as the process
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if tuned := context.option("tuned", ""):
        os.environ["FPE_COMMIT"] = tuned
        _read_the_table_again()
    resolve(call)(context)
    sys.stdout.flush()
