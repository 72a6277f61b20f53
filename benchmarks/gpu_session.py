"""`make gpu`: everything that needs a GPU, in under nine minutes, into one folder.

Stages run in this order, each in a process of its own, so that one that dies or hangs takes nothing along:

    environment   the GPU, driver, versions, commit, which backends serve
    correctness   the tests marked `gpu`, and the kernels' laws on the device
    roofline      the machine's own ceilings
    kernels       ours beside PyTorch's and the dense original, one case after the other
    tuning        launch configurations, swept at every length class; mixed batches as one launch and as two
    edits         whole UNet steps and whole edits (needs diffusers)
    recordings    a second edit from a recording of its source, against the whole edit (needs diffusers)
    memory        peaks against length

When time runs short it gives way in this order: the shapes that the tuner sweeps last, the models' shapes at
the end of the kernel plan, the larger images of the edits, the longest sequences of the memory suite. Each
plan starts with its most telling cases, each stage stops before its share of the time is over, and what an
early stage leaves goes to the later ones. Correctness is never cut by choice: a stage that overruns is killed,
and what it has written so far counts.

Nothing is installed. Without diffusers edits and recordings are skipped, and the summary says so.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .rows import ROOT, Row, read, write

BUDGET = 525.0
GRACE = 12.0  # to start a process, and for the case under way when a stage's time is over


NOTHING_COLLECTED = 5  # pytest's exit status for it


@dataclass(frozen=True)
class Stage:
    """`share` of the session's seconds; `file` in the result folder, written after every case."""

    name: str
    share: float
    file: str


STAGES = (
    Stage("environment", 0.03, "environment.txt"),
    Stage("correctness", 0.25, "correctness.txt"),
    Stage("roofline", 0.04, "cuda-roofline.json"),
    Stage("kernels", 0.26, "cuda-kernels.json"),
    Stage("tuning", 0.22, "cuda-tuning.json"),
    Stage("edits", 0.12, "cuda-edits.json"),
    Stage("recordings", 0.03, "cuda-recordings.json"),
    Stage("memory", 0.05, "cuda-memory.json"),
)
SUMMARY = "summary.txt"  # with what the environment stage wrote: folders of results come back with eight files at most


def schedule(stages: Sequence[Stage], run: Callable[[Stage, float], None], budget: float, clock=time.monotonic) -> None:
    """Run the stages in turn; each may take its share of what is left, so unused time moves on to the later ones."""
    start = clock()
    for number, stage in enumerate(stages):
        left = budget - (clock() - start)
        seconds = left * stage.share / sum(later.share for later in stages[number:])
        if seconds > 0:
            run(stage, seconds)


# Stages, each as it runs in its own process


def run_environment(out: Path, device: str) -> None:
    import torch

    from fpe_kernels import backends

    from .rows import Environment

    lines = [str(Environment.read(device)), f"backends: {backends()}", sys.version]
    if device == "cuda":
        lines += [str(torch.cuda.get_device_properties(0)), _output(["nvidia-smi"])]
    lines.append(_output([sys.executable, "-m", "pip", "list", "--format=freeze"]))
    (out / "environment.txt").write_text("\n".join(lines) + "\n")
    print(lines[0])


def run_correctness(out: Path, dry: bool) -> int:
    """pytest's exit status, the worst of the runs: first the tests that need a GPU, then every law on the device.

    Of the others those that launch kernels: what needs no device is tested where there is none.
    """
    runs = [(["tests/kernels"], ["-m", "gpu"]), (["tests/kernels"], ["-m", "not gpu and not slow", "-k", "riton"])]
    if _has("diffusers"):
        runs.insert(1, (["tests/pipeline"], ["-m", "gpu"]))
    if dry:
        runs = [(["tests/benchmarks/test_rows.py"], ["-m", "not gpu and not slow"])]
    workers = min(12, max(1, (os.cpu_count() or 2) - 2)) if _has("xdist") and not dry else 0
    worst = 0
    with (out / "correctness.txt").open("w") as log:
        for paths, selected in runs:
            command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", *paths, *selected]
            command += ["-n", str(workers)] if workers else []
            environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
            environment.pop("TRITON_INTERPRET", None)
            log.write("$ " + " ".join(command) + "\n")
            log.flush()
            status = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode
            worst = max(worst, 0 if status == NOTHING_COLLECTED else status)
    return worst


def run_measurements(stage: Stage, out: Path, device: str, until: float, dry: bool) -> None:
    import torch

    from . import edits, growth, measure, plan, recordings, tune
    from .providers import all_providers
    from .report import case_table
    from .run import Bench, run_kernels

    deadline = until - GRACE / 2
    effort = measure.Effort(rounds=3, seconds=0.2, sample_ms=1.0) if dry else measure.Effort(rounds=9, seconds=1.5)
    bench = Bench(device, torch.float16 if device == "cuda" else torch.float32, effort)
    path = out / stage.file
    collected: list[Row] = []

    def save(rows: list[Row]) -> None:
        collected.extend(rows)
        write(path, collected)
        if rows:
            print(case_table(rows) + "\n", flush=True)

    def left() -> float:
        return deadline - time.time()

    roofline = out / "cuda-roofline.json"
    if stage.name == "roofline":
        save(bench.roofline())
        return
    if roofline.exists():
        from .cost import Ceilings

        bench.ceilings = Ceilings.of_rows(read(roofline))
    if stage.name == "kernels":
        steps = plan.kernel_plan(device)
        run_kernels(bench, all_providers(), _small(steps) if dry else steps, save, left)
    elif stage.name == "tuning":
        shapes = tune.tuning_plan()
        bench.effort = effort if dry else tune.EFFORT
        if dry:
            tune.run_tuning(bench, [DRY_CASE], save, left, lambda case: tune.ALL[:2])
        else:
            tune.run_tuning(bench, shapes, save, left)
    elif stage.name == "edits":
        cases = [edits.UNetCase("tiny", 128)] if dry else edits.edit_plan(device)
        edits.run_edits(bench, cases, report=save, time_left=left)
    elif stage.name == "recordings":
        recordings.run_recordings(device, bench.effort, recordings.recordings_plan(quick=dry), save, left)
    elif stage.name == "memory":
        lengths = growth.memory_plan(device, quick=dry)
        growth.run_memory(bench, all_providers(), lengths[:2] if dry else lengths, save, left)


def _small(steps: Sequence) -> list:
    from .plan import Step

    return [Step(DRY_CASE), *(step for step in steps if step.case.tokens <= 64)][:2]


def _dry_case():
    from .cases import Case

    return Case("dry", 64, 64, 2, 8, 1, "pair")


DRY_CASE = _dry_case()


# The session


def session(out: Path, budget: float, device: str, dry: bool) -> int:
    out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        (out / stage.file).unlink(missing_ok=True)
    outcomes: dict[str, str] = {}
    begun = time.monotonic()

    def run(stage: Stage, seconds: float) -> None:
        reason = _reason_to_skip(stage, device, dry)
        if reason:
            outcomes[stage.name] = f"skipped: {reason}"
            print(f"== {stage.name}: skipped: {reason}", flush=True)
            return
        print(f"== {stage.name}: at most {seconds:.0f} s, {time.monotonic() - begun:.0f} s so far", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu_session", "--stage", stage.name, "--out", str(out)]
        command += ["--until", f"{time.time() + seconds:.1f}", "--device", device, *(["--dry-run"] if dry else [])]
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(timeout=seconds + GRACE)
            outcomes[stage.name] = "done" if status == 0 else f"FAILED (exit status {status})"
        except subprocess.TimeoutExpired:
            _stop(process)
            outcomes[stage.name] = "stopped at its time limit; what it had written counts"
        outcomes[stage.name] += f", {time.monotonic() - start:.0f} s"

    schedule(STAGES, run, budget)
    text = summarise(out, outcomes)
    about = out / STAGES[0].file
    (out / SUMMARY).write_text(text + "\n\n" + (about.read_text() if about.exists() else ""))
    about.unlink(missing_ok=True)
    print("\n" + text)
    return 1 if any("FAILED" in outcome for outcome in outcomes.values()) else 0


def _stop(process: subprocess.Popen) -> None:
    """End the stage and what it started; its own session is a process group by itself."""
    import signal

    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(timeout=5)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _reason_to_skip(stage: Stage, device: str, dry: bool) -> str | None:
    if stage.name in ("edits", "recordings") and not _has("diffusers"):
        return "diffusers is not installed here (a wheel on PYTHONPATH is enough)"
    if stage.name == "correctness" and not _has("pytest"):
        return "pytest is not installed here"
    if device != "cuda" and not dry:
        return "needs a CUDA device"
    return None


def summarise(out: Path, outcomes: dict[str, str]) -> str:
    """The tables, the stages' outcomes and the tests' last lines: what one wants to see last."""
    from .report import case_table, summary
    from .tune import best_table

    rows = [row for stage in STAGES for row in _rows_of(out / stage.file)]
    parts = []
    tuned = [row for row in rows if row.suite == "tuning"]
    if tuned:
        parts += [
            "Configurations or launches, fastest first, then the committed one and the fastest rival (ms):",
            best_table(tuned),
            "  (`python -m benchmarks.tune --apply cuda-tuning.json` takes them over)",
        ]
    parts += ["Times, as multiples of ours in the same rounds:", summary([r for r in rows if r.suite != "tuning"])]
    parts += [case_table(group) for group in _recorded(rows)]
    absent = {row.provider: row.reason for row in rows if row.status == "missing" and row.case == "any"}
    parts += [f"  missing: {name}: {reason}" for name, reason in absent.items()]
    correctness = out / "correctness.txt"
    if correctness.exists():
        lines = correctness.read_text().splitlines()
        parts += ["Correctness:"] + [f"  {line}" for line in lines if " in " in line and line[:1].isdigit()]
    parts += ["Stages:"] + [f"  {name}: {outcome}" for name, outcome in outcomes.items()]
    if rows:
        parts.append(rows[-1].machine)
    return "\n".join(parts)


def _recorded(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of the suite `recordings`, case by case."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row.suite == "recordings":
            cases.setdefault(row.case, []).append(row)
    return list(cases.values())


def _rows_of(path: Path) -> list[Row]:
    return read(path) if path.suffix == ".json" and path.exists() else []


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session", description=__doc__.split("\n")[0])
    default = Path(os.environ.get("OUT") or "gpu-results")
    parser.add_argument("--out", type=Path, default=default, help="result folder; default: $OUT, or gpu-results")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dry-run", action="store_true", help="the same stages on tiny cases, on a CPU")
    parser.add_argument("--stage", choices=[stage.name for stage in STAGES], help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)  # seconds since the epoch
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    device = "cpu" if options.dry_run else options.device
    if options.stage is None:
        return session(options.out.resolve(), options.budget, device, options.dry_run)
    stage = next(stage for stage in STAGES if stage.name == options.stage)
    if stage.name == "environment":
        run_environment(options.out, device)
        return 0
    if stage.name == "correctness":
        return run_correctness(options.out, options.dry_run)
    run_measurements(stage, options.out, device, options.until, options.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
