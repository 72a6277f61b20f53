"""What a batch saves: ten targets of one source, together from one recording and as ten single edits.

    python -m benchmarks batches

Both have the model in memory from the start, start from the same noise, and make the same pictures: the batch gets a
time only where its ten are the single edits' to rounding. It also measures its pictures and writes them as files in
memory, which the single edits here do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .measure import Effort, interleaved
from .rows import Environment, Row
from .run import first_line

__all__ = ["BATCH", "SINGLE", "SharedSource", "batches_plan", "run_batches"]

SINGLE, BATCH = "single-edits", "batch"
SOURCE = "a photo of a red {} on the beach"
#: Largest difference of two pictures that took the same way in another batch, of 255 levels.
LEVELS = 4


@dataclass(frozen=True)
class SharedSource:
    """Targets of one source: a method's name in the registry, a square image's side in pixels, denoising steps."""

    method: str
    targets: int = 10
    side: int = 128
    steps: int = 10

    @property
    def name(self) -> str:
        return f"{self.method}/{self.side}x{self.side}/{self.targets} targets/{self.steps} steps"


def batches_plan(*, quick: bool = False) -> list[SharedSource]:
    """Batches by the embedded model, the most telling first."""
    cases = [SharedSource("fpe"), SharedSource("masactrl")]
    return cases[:1] if quick else cases


def run_batches(
    device: str,
    effort: Effort,
    cases: Iterable[SharedSource],
    report: Callable[[list[Row]], None] = lambda rows: None,
    *,
    dtype: str = "auto",
) -> list[Row]:
    """All rows of some cases, by the embedded model."""
    from fpe_pipeline.batches.making import Maker
    from fpe_pipeline.batches.request import Weights

    rows: list[Row] = []
    maker: Any = None
    for case in cases:
        jobs = jobs_of(case, device, dtype)
        maker = maker or Maker(jobs[0].settings, Weights())
        measured = run(maker, case, jobs, effort)
        report(measured)
        rows += measured
    return rows


def jobs_of(case: SharedSource, device: str, dtype: str) -> list[Any]:
    """The jobs of a case, with as many threads as torch has."""
    from fpe_pipeline.batches.jobs import Job
    from fpe_pipeline.embedded.scenes.scenes import COLOURS, OBJECTS
    from fpe_pipeline.runs.settings import Settings

    thing = next(iter(OBJECTS))
    source = SOURCE.format(thing)
    others = [source.replace("red", colour) for colour in COLOURS if colour != "red"]
    others += [SOURCE.format(other) for other in OBJECTS if other != thing]
    return [
        Job(
            str(number),
            Settings(
                source, (target,), method=case.method, steps=case.steps, size=(case.side, case.side), control=False,
                device=device, dtype=dtype, threads=torch.get_num_threads(),
            ),
        )
        for number, target in enumerate(others[: case.targets])
    ]  # fmt: skip


def run(maker: Any, case: SharedSource, jobs: list[Any], effort: Effort) -> list[Row]:
    """Rows of one case.

    Args:
        maker: a :class:`~fpe_pipeline.batches.making.Maker`, which has the model.
        case: what is made.
        jobs: of it.
        effort: how long to measure.
    """
    from fpe_pipeline.batches.plan import groups_of
    from fpe_pipeline.batches.request import BatchRequest
    from fpe_pipeline.runs import run as runs

    environment = Environment.read(maker.device)
    at_once = BatchRequest.model_fields["at_once"].default
    ((group,), _) = groups_of(jobs, at_once, "")
    names = frozenset(job.name for job in jobs)

    def single() -> dict[str, Any]:
        return {job.name: runs.execute(job.settings, loaded=maker.loaded).edited[0] for job in jobs}

    def batch() -> dict[str, Any]:
        return {made.name: made for made in maker.make(group, names)}

    dtype = str(maker.loaded.pipe.unet.dtype).removeprefix("torch.")
    about = {"suite": "batches", "case": case.name, "dtype": dtype, "budget": float(LEVELS)}
    calls: dict[str, Callable[[], dict[str, Any]]] = {SINGLE: single, BATCH: batch}
    rows = []
    try:
        error = furthest(single(), batch())
    except (ValueError, RuntimeError) as problem:
        rows.append(Row.new(environment, **about, provider=BATCH, status="failed", reason=first_line(problem)))
        del calls[BATCH]
    else:
        if error > LEVELS:
            reason = f"a picture is {error} of 255 levels from the single edit, more than {LEVELS}"
            rows.append(Row.new(environment, **about, provider=BATCH, status="wrong", reason=reason, error=error))
            del calls[BATCH]
    samples = interleaved(calls, maker.device, effort, wall=True)
    return rows + [Row.new(environment, **about, provider=n, status="ok", samples_ms=samples[n]) for n in calls]


def furthest(expected: dict[str, Any], made: dict[str, Any]) -> float:
    """The largest difference, in levels, of a batch's pictures and the single edits'.

    Raises:
        RuntimeError: a job of the batch failed.
    """
    import io

    from PIL import Image

    from fpe_pipeline.batches.making import Failed
    from fpe_pipeline.images.distance import distance

    missing = [name for name in expected if isinstance(made.get(name), Failed | None)]
    if missing:
        raise RuntimeError(f"{len(missing)} jobs failed: {getattr(made.get(missing[0]), 'reason', 'nothing came')}")
    return float(max(distance(expected[name], Image.open(io.BytesIO(made[name].png))).levels for name in expected))
