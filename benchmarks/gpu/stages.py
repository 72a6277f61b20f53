"""The stages of a session, each as it runs in its own process: from a context to findings that it says as they come."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..rows import ROOT, Row
from .pool import STARTUP, Outcome, Task, resolve, share_out
from .records import say, say_row

if TYPE_CHECKING:
    from ..cases import Case
    from ..providers import Provider

CHECK_LIMIT = 25.0  # seconds for one check with a compilation or two in it
LEAST_CASE = 4.0  # seconds: with less left, no further case is begun
NOTHING_COLLECTED = 5  # pytest's exit status for it
OLDEST = (8, 0)  # compute capability that the Triton kernels need


@dataclass(frozen=True)
class Context:
    """What a stage is told: where results go, the device, when its time is over, whether it is a dry run on a CPU."""

    out: Path
    device: str
    until: float  # seconds since the epoch
    dry: bool = False
    options: tuple[tuple[str, str], ...] = ()

    def left(self) -> float:
        return self.until - time.time()

    @property
    def backend(self) -> str:
        return "triton" if self.device == "cuda" else "torch"

    def option(self, name: str, default: str) -> str:
        return dict(self.options).get(name, default)


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


# Smoke


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
    from .checks import full_problems, headline_cases, smoke_problems
    from .programs import COMPILE_LIMIT, compile_ahead, tasks_for, worker_count

    arch = _architecture(context)
    kind = context.option("session", "smoke")
    subjects: list[Any] = [*smoke_problems(arch), *((case, None) for case in headline_cases())]
    if kind == "full":
        subjects = [*_timed_subjects(arch), *([] if context.option("unchecked", "") else full_problems())]
    listed = [*([] if context.dry else tasks_for(subjects, arch)), *_planted(context, "plant-programs")]
    limit = float(context.option("check-limit", str(COMPILE_LIMIT)))
    count, seconds = 0, 0.0
    for task, took, problem in compile_ahead(listed, worker_count(), limit, context.left):
        count, seconds = count + 1, seconds + took
        if problem:
            say("failure", what=f"compiling {task.name}", why=problem)
    say("note", text=f"{count} programs compiled in {seconds:.0f} s of processor time")


def _timed_subjects(arch: str) -> list[Any]:
    from ..plan import kernel_plan
    from ..tune import choices, tuning_plan

    cases = [step.case for step in kernel_plan("cuda") if step.case.op in ("apply", "replay")]
    subjects: list[Any] = [(case, None) for case in cases]
    return subjects + [(case, choice) for case in tuning_plan() for choice in choices(case, arch)]


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
    from .programs import worker_count

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


def ratios(context: Context) -> None:
    """Ours beside the fastest that PyTorch has, queries and keys of every row in memory of their own."""
    from ..providers import all_providers
    from .checks import headline_cases

    named = all_providers()
    wanted = ["fpe-triton", *(name for name in named if name.startswith(("unedited", "sdpa-")) and "math" not in name)]
    if context.device != "cuda":
        wanted = ["fpe-torch", "unedited"]
    cases = [_dry_case()] if context.dry else headline_cases()
    _time(context, [(case, [named[name] for name in wanted]) for case in cases], rounds=15, seconds=2.0)


def _time(context: Context, steps: Iterable[tuple[Case, list[Provider]]], rounds: int, seconds: float) -> None:
    from .. import measure

    bench = _bench(context)
    brief = measure.Effort(rounds=3, seconds=0.2, sample_ms=1.0)
    bench.effort = brief if context.dry else measure.Effort(rounds=rounds, seconds=seconds, sample_ms=5.0)
    for case, providers in steps:
        if context.left() < LEAST_CASE:
            say("note", text=f"no time left for {case.name} and what follows it")
            return
        say("begin", what=case.name)
        for row in bench.case(case, providers):
            say_row(row)
        say("end", what=case.name)


def edited_step(context: Context) -> None:
    """A step of SD 1.5's UNet at its true size: edited, and unedited."""
    from ..unets import UNetCase

    cases = [UNetCase("tiny", 64)] if context.dry else [UNetCase("sd15", 512), UNetCase("sd15", 1024)]
    _edits(context, cases, ("unedited", "fpe"), rounds=7)


def _edits(context: Context, cases: Sequence[Any], names: Sequence[str], rounds: int) -> None:
    from .. import edits, measure

    bench = _bench(context)
    bench.effort = measure.Effort(rounds=3 if context.dry else rounds, seconds=4.0, sample_ms=20.0)
    for case in cases:
        if context.left() < 2 * LEAST_CASE:
            say("note", text=f"no time left for {case.name} and what follows it")
            return
        say("begin", what=case.name)
        for row in edits.run_edit(bench, case, names):
            say_row(row)
        say("end", what=case.name)


# The rest of a full session


def device_tests(context: Context) -> None:
    """The tests marked `gpu`; every outcome is said by name as it comes."""
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
        command += ["-n", "4"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if status not in (0, 1, NOTHING_COLLECTED):  # 1: failures, each of which has been said
        say("failure", what="pytest -m gpu", why=f"exit status {status}")


def _files_with_gpu_tests() -> list[str]:
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]


def roofline(context: Context) -> None:
    for row in _bench(context).roofline():
        say_row(row)


def kernels(context: Context) -> None:
    from ..plan import kernel_plan
    from ..providers import all_providers

    named = all_providers()
    steps = [(step.case, step.choose(named)) for step in kernel_plan(context.device)]
    if context.dry:
        steps = [(_dry_case(), ["fpe-torch", "sdpa"])]
    _time(context, [(case, [named[name] for name in names]) for case, names in steps], rounds=9, seconds=0.8)


def tuning(context: Context) -> None:
    """Launch configurations, for maps with equally many rows."""
    _tune(context, mixed=False)


def launches(context: Context) -> None:
    """Mixed batches as one launch and as two, by the configurations that there are now."""
    _tune(context, mixed=True)


def _tune(context: Context, mixed: bool) -> None:
    from .. import tune

    bench = _bench(context)

    def report(rows: list[Row]) -> None:
        for row in rows:
            say_row(row)

    shapes = [case for case in tune.tuning_plan() if (case.layout == "guided") == mixed]
    shapes = [_dry_case()] if context.dry else shapes
    choose = (lambda case: tune.ALL[:2]) if context.dry else None
    tune.run_tuning(bench, shapes, report, lambda: context.left() - LEAST_CASE, choose)


def edits(context: Context) -> None:
    from ..edits import EDITORS, edit_plan
    from ..unets import UNetCase

    cases = [UNetCase("tiny", 128)] if context.dry else edit_plan(context.device)
    _edits(context, cases, tuple(EDITORS), rounds=7)


def recordings(context: Context) -> None:
    from .. import measure, recordings

    effort = measure.Effort(rounds=3 if context.dry else 5, seconds=2.0, sample_ms=20.0)
    for case in recordings.recordings_plan(quick=context.dry):
        if context.left() < 2 * LEAST_CASE:
            say("note", text=f"no time left for {case.name} and what follows it")
            return
        say("begin", what=case.name)
        for row in recordings.run_recordings(context.device, effort, [case]):
            say_row(row)
        say("end", what=case.name)


def memory(context: Context) -> None:
    from .. import growth
    from ..providers import all_providers

    lengths = growth.memory_plan(context.device, quick=context.dry)
    for case in lengths[:2] if context.dry else lengths:
        if context.left() < LEAST_CASE:
            return
        say("begin", what=case.name)
        for row in growth.run_memory(_bench(context), all_providers(), [case]):
            say_row(row)
        say("end", what=case.name)


def train(context: Context) -> None:
    from .training import train_models

    train_models(context)


# Common


def _bench(context: Context) -> Any:
    import torch

    from .. import measure
    from ..cost import Ceilings
    from ..run import Bench
    from .records import read_journal, rows_of

    half = torch.float16 if context.device == "cuda" else torch.float32
    bench = Bench(context.device, half, measure.Effort(rounds=5, seconds=1.5, sample_ms=5.0))
    journals = sorted(context.out.glob("*.jsonl"))
    ceilings = [row for path in journals for row in rows_of(read_journal(path)) if row.suite == "roofline"]
    if ceilings:
        bench.ceilings = Ceilings.of_rows(ceilings)
    return bench


def _architecture(context: Context) -> str:
    import torch

    from fpe_kernels.backends.triton.configs import architecture

    return architecture(torch.device(context.device))


def _devices() -> int:
    import torch

    return torch.cuda.device_count()


def _dry_case() -> Any:
    from ..cases import Case

    return Case("dry", 64, 64, 2, 8, 1, "pair")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"


def _stage(name: str, share: float, function: Callable[[Context], None], *needs: str, least: float = 0.0) -> Stage:
    return Stage(name, share, f"{__name__}:{function.__name__}", needs, least)


SMOKE = (
    _stage("environment", 0.05, environment, least=15.0),
    _stage("programs", 0.31, programs, "triton"),
    _stage("checks", 0.24, smoke_checks),
    _stage("ratios", 0.22, ratios),
    _stage("step", 0.18, edited_step, "diffusers"),
)
FULL = (
    _stage("environment", 0.02, environment, least=15.0),
    _stage("programs", 0.16, programs, "triton"),
    _stage("checks", 0.08, full_checks),
    _stage("roofline", 0.03, roofline, least=10.0),
    _stage("tuning", 0.16, tuning),
    _stage("launches", 0.04, launches),
    _stage("kernels", 0.20, kernels),
    _stage("edits", 0.15, edits, "diffusers"),
    _stage("recordings", 0.04, recordings, "diffusers"),
    _stage("memory", 0.04, memory),
    _stage("tests", 0.08, device_tests, "pytest"),
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
    if context.option("tuned", ""):
        _read_the_table_again()
    resolve(call)(context)
    sys.stdout.flush()
