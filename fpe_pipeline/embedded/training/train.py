"""Rebuild the embedded model end to end: ``python -m fpe_pipeline.embedded.training.train --preset cpu``.

Scenes are rendered, the autoencoder learns them, their latents are cached, the judge learns the renders, UNet and text
encoder learn the latents, everything is exported, measured and shown in pictures. Each network leaves its state in
``--work``; a run that was stopped continues where it was. With ``--max-minutes`` everything, from this module's first
line on, is done by then: schedules follow the clock.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ... import endings
from .arguments import check_device, minutes, seed, threads
from .data import drawn_scenes
from .presets import PRESETS, Preset
from .timebox import GRACE, TimeBox

__all__ = ["PRESETS", "Preset", "main", "train"]

log = logging.getLogger(__name__)


def train(
    preset: Preset,
    work: Path,
    output: Path,
    *,
    report: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    box: TimeBox | None = None,
    stop_after: int | None = None,
) -> dict[str, object] | None:
    """Run every stage that is not finished yet and export the result.

    Args:
        preset: sizes and schedules.
        work: folder for caches and checkpoints.
        output: folder the model is written to.
        report: folder for ``metrics.json`` and the pictures; none are made without it.
        seed: of everything that is drawn or initialised.
        device: a torch device name.
        box: the wall time that all of this may take.
        stop_after: leave after this many steps of the first unfinished network.

    Returns:
        The measurements that were exported, or ``None`` if it left early.
    """
    box = box or TimeBox(None)
    # The scenes are drawn while torch and diffusers are still being imported.
    with drawn_scenes(work, preset.scenes, preset.held_out, preset.size, seed) as (drawn, held):
        from .stages import Stages

        box.mark("imports")
        return Stages(preset, work, output, report, seed, device, box, stop_after).run(drawn, held)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fpe_pipeline.embedded.training.train", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--work", type=Path, help="caches and checkpoints (default: runs/PRESET)")
    parser.add_argument("--output", type=Path, help="where the model is written (default: WORK/model)")
    parser.add_argument("--report", type=Path, help="where metrics and pictures are written (default: WORK/report)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--device", help="torch device (default: cuda for the gpu preset, else cpu)")
    parser.add_argument("--threads", type=threads, help="CPU threads")
    parser.add_argument("--max-minutes", type=minutes, help="wall time for everything; schedules follow")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    box = TimeBox(args.max_minutes)
    device = args.device or ("cuda" if args.preset == "gpu" else "cpu")
    check_device(parser, device)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    work = args.work or Path("runs") / args.preset
    output, report = args.output or work / "model", args.report or work / "report"
    box.guard(GRACE, output)
    try:
        with endings.orderly():
            train(PRESETS[args.preset], work, output, report=report, seed=args.seed, device=device, box=box)
    except KeyboardInterrupt as interruption:
        return endings.tell(interruption, parser.prog, "; run it again to go on")
    box.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
