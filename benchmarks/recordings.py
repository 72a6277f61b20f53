"""What a recording saves: an edit with its source beside it, and the same edit from a recording of the source.

    python -m benchmarks recordings
    python -m benchmarks.recordings --model MODEL --steps 20 --sides 512 768 --methods fpe pnp --output rows.json

Both start from the same noise and make the same target, by guided DDIM on the embedded model or on another. The
recorded edit gets a time only where its image is the full edit's to rounding. Beside the full edit stands one that
drops its source after the last step that needs it and makes no image of it, which is as little as an edit can do
without a recording.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .measure import QUICK, THOROUGH, Effort, interleaved
from .rows import Environment, Ratio, Row, write
from .run import first_line

log = logging.getLogger("benchmarks")

FULL, DROPPED = "full", "full-source-dropped"
SOURCE, TARGET = "a photo of a red car on the beach", "a photo of a blue car on the beach"
# MasaCtrl's tenth layer on is Stable Diffusion's decoder; smaller models have that too, with fewer layers before it.
OPTIONS = {"masactrl": {"layers": ("up_blocks",)}}
# Largest difference of two latents that took the same way in another batch, as a share of the largest latent.
ROUNDING = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class RecordedEdit:
    """One edit of one target: a method's name in the registry, a square image's side in pixels, its steps."""

    method: str
    side: int
    steps: int = 20

    @property
    def name(self) -> str:
        return f"{self.method}/{self.side}x{self.side}/1 target/{self.steps} steps"


def recordings_plan(*, quick: bool = False) -> list[RecordedEdit]:
    """Edits by the embedded model, the most telling first: its own size, a larger one, other methods."""
    if quick:
        return [RecordedEdit("fpe", 128, steps=5)]
    cases = [RecordedEdit("fpe", side) for side in (128, 192)]
    return [*cases, *(RecordedEdit(method, 128) for method in ("p2p-replace", "masactrl", "pnp"))]


def run_recordings(
    device: str,
    effort: Effort,
    cases: Iterable[RecordedEdit],
    report: Callable[[list[Row]], None] = lambda rows: None,
    time_left: Callable[[], float] = lambda: float("inf"),
    *,
    model: str = "embedded",
    dtype: str = "auto",
) -> list[Row]:
    """All rows of some cases, by one model; stops where no time is left."""
    from fpe_pipeline.models.loading import pick_dtype
    from fpe_pipeline.models.sources import find_model
    from fpe_pipeline.runs.loading import load_pipeline
    from fpe_pipeline.sampling.noise_schedule import ddim_scheduler

    pipe = load_pipeline(find_model(model), dtype=pick_dtype(dtype, device), device=device)
    pipe.scheduler = ddim_scheduler(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    rows: list[Row] = []
    for case in cases:
        if time_left() <= 0:
            log.warning("no time left for %s", case.name)
            break
        try:
            with tempfile.TemporaryDirectory() as folder:
                measured = run(pipe, case, effort, Path(folder))
        except ValueError as problem:
            about = {"suite": "recordings", "case": case.name, "dtype": str(pipe.unet.dtype).removeprefix("torch.")}
            about |= {"provider": FULL, "status": "failed", "reason": first_line(problem)}
            measured = [Row.new(Environment.read(device), **about)]
        report(measured)
        rows += measured
    return rows


def edit_of(case: RecordedEdit, tokenizer: Any) -> Any:
    """The edit of a case."""
    from fpe_pipeline.edits.registry import make_edit

    return make_edit(case.method, [SOURCE, TARGET], tokenizer, **OPTIONS.get(case.method, {}))


def run(pipe: Any, case: RecordedEdit, effort: Effort, folder: Path) -> list[Row]:
    """Rows of a whole edit of one target, with the source and from recordings in every placement.

    Args:
        pipe: a `FreePromptPipeline` with a deterministic scheduler.
        case: what to edit.
        effort: how long to measure.
        folder: empty, for the recording on disk.
    """
    device, dtype = str(pipe.device), pipe.unet.dtype
    environment = Environment.read(device)
    grid = (case.side // pipe.vae_scale_factor,) * 2
    noise = torch.randn(1, pipe.unet.config.in_channels, *grid, generator=torch.Generator().manual_seed(0)).to(dtype)
    edit = edit_of(case, pipe.tokenizer)
    options = {"num_inference_steps": case.steps, "latents": noise.to(device), "edit": edit}

    def full() -> torch.Tensor:
        return pipe(SOURCE, TARGET, output_type="latent", **options).images[1:]

    def dropped() -> torch.Tensor:
        return pipe(SOURCE, TARGET, output_type="latent", keep_source=False, **options).images

    placements = {"recorded-device": "device", "recorded-cpu": "cpu", "recorded-folder": folder / "recording"}
    recordings = {name: pipe.record(SOURCE, placement=place, **options) for name, place in placements.items()}

    def replay(name: str) -> torch.Tensor:
        return pipe.edit(recordings[name], TARGET, edit=edit, output_type="latent").images

    calls: dict[str, Any] = {
        FULL: full,
        DROPPED: dropped,
        **{name: lambda name=name: replay(name) for name in recordings},
    }
    expected = full()
    about = {
        "suite": "recordings",
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "budget": ROUNDING[dtype],
    }
    rows = []
    for name in [DROPPED, *recordings]:
        error = float((calls[name]() - expected).abs().max() / expected.abs().max())
        if not error <= ROUNDING[dtype]:
            reason = f"relative error {error:.2e} exceeds its budget of {ROUNDING[dtype]:.2e}"
            rows.append(Row.new(environment, **about, provider=name, status="wrong", reason=reason, error=error))
            del calls[name]
    samples = interleaved(calls, device, effort, wall=True)
    return rows + [Row.new(environment, **about, provider=n, status="ok", samples_ms=samples[n]) for n in calls]


def main(argv: Sequence[str] | None = None) -> int:
    from fpe_pipeline.edits.registry import METHODS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.recordings", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="as in `fpe edit` (default: the embedded model)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--sides", type=int, nargs="+", default=[128], help="image sides in pixels (default: 128)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["fpe"], help="(default: fpe)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--output", type=Path, help="file for the rows")
    options = parser.parse_args(argv)

    from fpe_pipeline.models.loading import pick_device

    def show(measured: list[Row]) -> None:
        (full,) = [row for row in measured if row.provider == FULL]
        print(f"{full.case}, {full.machine}")
        for row in measured:
            share = "" if row.status != "ok" else f"{1 / Ratio.of(row, full).median:.2f} of the full edit"
            print(f"  {row.provider:<20}{row.median_ms or float('nan'):>10.1f} ms  {share or row.reason}", flush=True)

    cases = [RecordedEdit(method, side, options.steps) for method in options.methods for side in options.sides]
    effort, device = (QUICK if options.quick else THOROUGH), pick_device(options.device)
    rows = run_recordings(device, effort, cases, show, model=options.model, dtype=options.dtype)
    if options.output is not None:
        write(options.output, rows)
    return int(any(row.status != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
