"""A session: stages one after the other, each in its own process and time; all that they say is written at once."""

from __future__ import annotations

import importlib.util
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..report import case_table, summary
from ..rows import Row, merge, read, replaced, write
from ..workers.pool import cuda_after_fork, starting, warm_up
from .context import Context
from .records import Journal, Record, heard, read_journal, rows_of
from .stages import SESSIONS, TUNING, Stage, run_stage

GRACE = 6.0  # seconds to start a process, and for the case under way when a stage's time is over
BUDGETS = {"smoke": 150.0, "full": 540.0, "train": 210.0}
"""Seconds: a quarter of an hour in all."""

SUITES = ("roofline", "kernels", "tuning", "edits", "recordings", "memory")
SUMMARY, KEPT = "summary.txt", 200


@dataclass
class Findings:
    """All that has been said in a session."""

    journal: Journal
    records: list[Record] = field(default_factory=list)
    under_way: dict[str, None] = field(default_factory=dict)

    def take(self, record: Record) -> None:
        self.records.append(record)
        if record["kind"] == "begin":
            self.under_way[record["what"]] = None
        elif record["kind"] == "end":
            self.under_way.pop(record["what"], None)
        self.journal.keep(record)

    def fail(self, what: str, why: str) -> None:
        self.take({"kind": "failure", "what": what, "why": why})

    @property
    def failures(self) -> list[Record]:
        return [record for record in self.records if record["kind"] == "failure"]


def schedule(
    stages: Sequence[Stage],
    run: Callable[[Stage, float], None],
    budget: float,
    clock=time.monotonic,
    missed: Callable[[Stage], None] = lambda stage: None,
) -> None:
    """Run the stages in turn; each may take its share of what is left, so unused time moves on to the later ones.

    `missed` is told of those for which stages that overran have left nothing.
    """
    start = clock()
    for number, stage in enumerate(stages):
        left = budget - (clock() - start)
        seconds = left * stage.share / sum(later.share for later in stages[number:])
        seconds = min(left, max(stage.least, seconds))
        if seconds > 0:
            run(stage, seconds)
        else:
            missed(stage)


def reason_to_skip(stage: Stage, device: str) -> str:
    """Why a stage is not run; "" where it is."""
    missing = [name for name in stage.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed here (a wheel on PYTHONPATH is enough)"
    if device == "cuda" and stage.name in ("programs", "checks", "tests") and (too_old := _too_old()):
        return too_old
    return ""


def _too_old() -> str:
    import torch

    from .stages import OLDEST

    capability = torch.cuda.get_device_capability()
    return "" if capability >= OLDEST else f"the Triton kernels do not serve compute capability {capability}"


class Session:
    """One run of `smoke`, `full` or `train`."""

    def __init__(
        self,
        kind: str,
        out: Path,
        budget: float,
        device: str,
        *,
        dry: bool = False,
        options: dict[str, str] | None = None,
        only: Sequence[str] = (),
    ) -> None:
        """`only` names the stages to run, in their usual order; left out, all of them."""
        self.stages = [stage for stage in SESSIONS[kind] if not only or stage.name in only]
        self.kind, self.out, self.budget, self.device, self.dry = kind, out, budget, device, dry
        self.options = {"session": kind, **(options or {})}
        if only and "checks" not in only:
            self.options["unchecked"] = "yes"  # so nothing is compiled for checks
        self.outcomes: dict[str, str] = {}
        out.mkdir(parents=True, exist_ok=True)
        journal = Path(self.options.pop("journal", "") or out / f"{kind}.jsonl")
        if journal.is_file():
            _put_aside(journal)
        self.findings = Findings(Journal(journal))
        self._rest = b""  # of a line that a stage has not ended yet

    def run(self) -> int:
        """All stages; the exit status, which is 1 after any failure."""
        before = signal.signal(signal.SIGTERM, self._interrupted)
        begun = time.monotonic()
        if self.device == "cuda" and not cuda_after_fork():
            self.findings.take(
                {"kind": "note", "text": "a forked process cannot use the device: each stage imports anew"}
            )
        warm_up()  # so that no stage's time goes into imports
        print(f"== ready to start stages after {time.monotonic() - begun:.0f} s", flush=True)
        try:
            left = self.budget - (time.monotonic() - begun)
            run = lambda stage, seconds: self._stage(stage, seconds, begun)  # noqa: E731
            schedule(self.stages, run, left, missed=self._missed)
        except KeyboardInterrupt:
            self.findings.fail("the session", "interrupted; later stages did not run")
        finally:
            signal.signal(signal.SIGTERM, before)
        self._finish()
        return 1 if self.findings.failures else 0

    def _interrupted(self, number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def _stage(self, stage: Stage, seconds: float, begun: float) -> None:
        reason = reason_to_skip(stage, self.device)
        if reason:
            self._outcome(stage, f"skipped: {reason}")
            return
        print(f"== {stage.name}: at most {seconds:.0f} s, {time.monotonic() - begun:.0f} s so far", flush=True)
        start = time.monotonic()
        self.findings.under_way.clear()
        heard_from, ours = os.pipe()
        output = Connection(ours, readable=False)
        context = Context(self.out, self.device, time.time() + seconds, self.dry, tuple(self.options.items()))
        process = starting().Process(target=run_stage, args=(stage.call, context, output))
        process.start()
        output.close()
        self._rest = b""
        try:
            overrun = self._listen(heard_from, process, start + seconds + GRACE)
        finally:
            _end(process)
            self._listen(heard_from, process, time.monotonic() + GRACE)  # what it said last
            os.close(heard_from)
        at = ", ".join(list(self.findings.under_way)[:5])
        at = f" while at: {at}" if at else ""
        took, status = time.monotonic() - start, process.exitcode
        if overrun:
            self.findings.fail(f"stage {stage.name}", f"killed after {took:.0f} s, past its time{at}")
            self._outcome(stage, f"KILLED at its time limit after {took:.0f} s{at}; what it had found counts")
        elif status:
            word = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            self.findings.fail(f"stage {stage.name}", f"ended by {word}{at}")
            self._outcome(stage, f"FAILED ({word}) after {took:.0f} s{at}")
        else:
            self._outcome(stage, f"done, {took:.0f} s")
        if stage.name in TUNING and self.options.get("take-over") and not self.dry:
            self._take_over()

    def _missed(self, stage: Stage) -> None:
        self.findings.fail(f"stage {stage.name}", "no time was left for it")
        self._outcome(stage, "not run: no time was left")

    def _take_over(self) -> None:
        """Have the later stages measure with what the tuner found; the tree's table is changed, and rows say so."""
        from ..rows import commit
        from ..tuned_table import take_over

        rows = [row for row in rows_of(self.findings.records) if row.suite == "tuning"]
        try:
            text = take_over(rows)
        except (OSError, ValueError) as error:
            self.findings.fail("taking over the tuner's table", str(error))
            return
        self.findings.take({"kind": "note", "text": f"taken over:\n{text}"})
        print(text, flush=True)
        # Stages are forked from a process that began before: they are told what their rows are to say.
        self.options["tuned"] = commit().removesuffix("+tuned") + "+tuned"

    def _listen(self, descriptor: int, process: BaseProcess, deadline: float) -> bool:
        """Take what the stage says until it ends; True if it had to be ended."""
        ended = False
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not ended:
                left = deadline - time.monotonic()
                if left <= 0:
                    return True
                ended = process.exitcode is not None  # its children may hold the pipe open
                while selector.select(0.0 if ended else min(left, 0.5)):
                    chunk = os.read(descriptor, 1 << 16)
                    if not chunk:
                        process.join(max(0.0, deadline - time.monotonic()))
                        return process.exitcode is None
                    *lines, self._rest = (self._rest + chunk).split(b"\n")
                    for line in lines:
                        self._line(line.decode(errors="replace"))
                    if not ended and time.monotonic() >= deadline:
                        return True  # a stage that never pauses is over all the same
        return False

    def _line(self, line: str) -> None:
        record = heard(line)
        if record is None:
            print(line, flush=True)
            return
        self.findings.take(record)
        if record["kind"] == "failure":
            print(f"  FAILURE {record['what']}: {record['why']}", flush=True)

    def _outcome(self, stage: Stage, text: str) -> None:
        self.outcomes[stage.name] = text
        self.findings.take({"kind": "stage", "stage": stage.name, "outcome": text, "at": time.time()})
        print(f"== {stage.name}: {text}", flush=True)

    def _finish(self) -> None:
        journal = self.findings.journal
        journal.flush()
        if journal.problem:
            self.findings.records.append({"kind": "failure", "what": "writing results", "why": journal.problem})
        text = summarise(self.findings.records, self.outcomes)
        try:
            collect(self.out, rows_of(self.findings.records))
            (self.out / SUMMARY).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            self.findings.records.append({"kind": "failure", "what": "writing results", "why": str(error)})
        print("\n" + text)
        if journal.waiting:
            saved = journal.rescue(sys.stdout)
            print(f"What could not be written lies in {saved}" if saved else "What could not be written stands above.")


def _put_aside(journal: Path) -> Path:
    """An earlier session's: rows of suites that have no file yet are nowhere else."""
    numbered = (journal.with_stem(f"{journal.stem}-{number}") for number in count(1))
    return journal.rename(next(path for path in numbered if not path.exists()))


def _end(process: BaseProcess) -> None:
    """End a stage and what it started; its own session is a process group by itself."""
    assert process.pid is not None
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except (ProcessLookupError, PermissionError):
            break
        process.join(3)


def collect(out: Path, rows: Sequence[Row], suites: Sequence[str] = SUITES) -> list[Path]:
    """Write rows into the files that tables are made of, one a suite, beside those of other cases that are there.

    A session writes those of :data:`SUITES`: with its journal and summary as many files as may leave some machines.
    """
    written = []
    kind = "cuda" if any(row.on_gpu for row in rows) else "cpu"
    for suite in suites:
        fresh = [row for row in rows if row.suite == suite]
        if not fresh:
            continue
        path = out / f"{kind}-{suite}.json"
        before = read(path) if path.exists() else []
        write(path, merge(replaced(before, fresh)))
        written.append(path)
    return written


def summarise(records: Sequence[Record], outcomes: dict[str, str]) -> str:
    """The tables, the checks, every failure by name, and the stages' outcomes: what one wants to see last."""
    from ..tune import best_table

    rows = rows_of(records)
    parts = []
    tuned = [row for row in rows if row.suite == "tuning"]
    if tuned:
        parts += [
            "Configurations, fastest first, then the committed one and the fastest rival (ms):",
            best_table(tuned),
        ]
        parts += ["  (`python -m benchmarks.tune --apply cuda-tuning.json` takes them over)"]
    timed = [row for row in rows if row.suite in ("kernels", "edits")]
    if timed:
        parts += ["Times, as multiples of ours in the same rounds:", summary(timed)]
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row.suite == "recordings":
            cases.setdefault(row.case, []).append(row)
    parts += [case_table(group) for group in cases.values()]
    absent = {row.provider: row.reason for row in rows if row.status == "missing" and row.case == "any"}
    parts += [f"  missing: {name}: {reason}" for name, reason in absent.items()]
    checks = [record for record in records if record["kind"] == "check"]
    if checks:
        parts.append(f"Checks: {sum(check['ok'] for check in checks)} of {len(checks)} agree")
    parts += [record["text"] for record in records if record["kind"] == "note"]
    parts += ["Stages:"] + [f"  {name}: {outcome}" for name, outcome in outcomes.items()]
    failures = [record for record in records if record["kind"] == "failure"]
    parts.append(f"Failures: {len(failures) or 'none'}")
    parts += [f"  {record['what']}: {record['why']}" for record in failures[:KEPT]]
    if rows:
        parts.append(rows[-1].machine)
    return "\n".join(parts)


def collect_journals(out: Path) -> list[Path]:
    """Make the files of rows of every suite from the journals of a folder.

    A case that several sessions measured is that of the latest: rows of different rounds have no ratio.
    """
    journals = [list(read_journal(path)) for path in sorted(out.glob("*.jsonl"), reverse=True)]
    written: dict[Path, None] = {}
    for records in sorted(journals, key=lambda records: max((r.get("at", 0.0) for r in records), default=0.0)):
        rows = rows_of(records)
        written |= dict.fromkeys(collect(out, rows, sorted({row.suite for row in rows})))
    return list(written)
