"""Stages that take times and peaks: each case is said when it begins, and its rows the moment they are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..rows import Row
from .records import say, say_row

if TYPE_CHECKING:
    from ..cases import Case
    from ..providers import Provider
    from .context import Context

LEAST_CASE = 4.0  # seconds: with less left, no further case is begun
TIMED = 1 / 3  # of what is left, at most, goes into the rounds of one case: it is built and judged before them


def ratios(context: Context) -> None:
    """Ours beside the fastest that PyTorch has, queries and keys of every row in memory of their own."""
    from ..rivals import all_providers
    from .checks import headline_cases

    named = all_providers()
    wanted = ["fpe-triton", *(name for name in named if name.startswith(("unedited", "sdpa-")) and "math" not in name)]
    if context.device != "cuda":
        wanted = ["fpe-torch", "unedited"]
    cases = [_dry_case()] if context.dry else headline_cases()
    _time(context, [(case, [named[name] for name in wanted]) for case in cases], rounds=15, seconds=2.0)


def _time(context: Context, steps: Iterable[tuple[Case, list[Provider]]], rounds: int, seconds: float) -> None:
    from .. import measure

    bench = bench_of(context)
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


def _edits(context: Context, cases: Sequence[Any], names: Sequence[str], rounds: int, seconds: float = 4.0) -> None:
    from .. import edits, measure

    bench = bench_of(context)
    for case in cases:
        if context.left() < 2 * LEAST_CASE:
            say("note", text=f"no time left for {case.name} and what follows it")
            return
        say("begin", what=case.name)
        most = min(seconds, TIMED * context.left())
        bench.effort = measure.Effort(rounds=3 if context.dry else rounds, seconds=most, sample_ms=20.0)
        for row in edits.run_edit(bench, case, names):
            say_row(row)
        say("end", what=case.name)


def roofline(context: Context) -> None:
    for row in bench_of(context).roofline():
        say_row(row)


def kernels(context: Context) -> None:
    from ..plan import kernel_plan
    from ..rivals import all_providers

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
    from .. import candidates, tune

    bench = bench_of(context)

    def report(rows: list[Row]) -> None:
        for row in rows:
            say_row(row)

    shapes = [case for case in candidates.tuning_plan() if (case.layout == "guided") == mixed]
    shapes = [_dry_case()] if context.dry else shapes
    choose = (lambda case: candidates.ALL[:2]) if context.dry else None
    tune.run_tuning(bench, shapes, report, lambda: context.left() - LEAST_CASE, choose)


def edits(context: Context) -> None:
    from ..edits import EDITORS, edit_plan
    from ..unets import UNetCase

    told = [UNetCase("tiny", 128)] if context.dry else edit_plan(context.device, quick=True)
    _edits(context, told, tuple(EDITORS), rounds=40, seconds=20.0)  # what the host does varies most
    others = [] if context.dry else [case for case in edit_plan(context.device) if case not in told]
    _edits(context, others, tuple(EDITORS), rounds=7)


def transformers(context: Context) -> None:
    """Edited steps of transformers with joint attention."""
    from .. import joint_steps, measure

    bench = bench_of(context)
    for case in joint_steps.SMALL[:1] if context.dry else joint_steps.GPU_CASES:
        if context.left() < 2 * LEAST_CASE:
            say("note", text=f"no time left for {case.name} and what follows it")
            return
        say("begin", what=case.name)
        most = min(4.0, TIMED * context.left())
        bench.effort = measure.Effort(rounds=3 if context.dry else 7, seconds=most, sample_ms=20.0)
        for row in joint_steps.run(bench, case):
            say_row(row)
        say("end", what=case.name)


def compiled(context: Context) -> None:
    """Steps under `torch.compile`, replayed as CUDA graphs."""
    from .. import measure
    from ..compiled import REDUCED, run_compiled
    from ..unets import UNetCase

    bench = bench_of(context)
    bench.effort = measure.Effort(rounds=3 if context.dry else 15, seconds=6.0, sample_ms=60.0)
    options = {"backend": "eager"} if context.dry else REDUCED
    cases = [UNetCase("sd15", 512), UNetCase("sd15", 1024), UNetCase("sdxl", 1024)]
    cases = [UNetCase("tiny", 64)] if context.dry else cases
    say("begin", what="compiling steps")
    timing = len(cases) * bench.effort.seconds  # begins when all are compiled, or given up
    for rows in run_compiled(bench, cases, options=options, time_left=lambda: context.left() - timing):
        for row in rows:
            say_row(row)
    say("end", what="compiling steps")


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
    from ..rivals import all_providers

    lengths = growth.memory_plan(context.device, quick=context.dry)
    for case in lengths[:2] if context.dry else lengths:
        if context.left() < LEAST_CASE:
            say("note", text=f"no time left for {case.name} and what follows it")
            return
        say("begin", what=case.name)
        for row in growth.run_memory(bench_of(context), all_providers(), [case]):
            say_row(row)
        say("end", what=case.name)


def bench_of(context: Context) -> Any:
    import torch

    from .. import measure
    from ..cost import Ceilings
    from ..run import Bench
    from .records import read_journal, rows_of

    half = torch.float16 if context.device == "cuda" else torch.float32
    bench = Bench(context.device, half, measure.Effort(rounds=5, seconds=1.5, sample_ms=5.0))
    journals = sorted(context.out.glob("*.jsonl"))
    measured = [row for path in journals for row in rows_of(read_journal(path)) if row.suite == "roofline"]
    like = bench.row(suite="", case="", provider="", status="ok")
    ceilings = [row for row in measured if (row.device, row.dtype) == (like.device, like.dtype)]
    if ceilings:
        bench.ceilings = Ceilings.of_rows(ceilings)
    return bench


def _dry_case() -> Any:
    from ..cases import Case

    return Case("dry", 64, 64, 2, 8, 1, "pair")
