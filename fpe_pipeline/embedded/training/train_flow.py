"""Train the embedded transformer: ``python -m fpe_pipeline.embedded.training.train_flow --preset cpu``.

Scenes are rendered and encoded by the embedded model's autoencoder; transformer and text encoders learn the latents by
flow matching; the result is exported as a Stable Diffusion 3 pipeline and measured. A run that was stopped continues
where it was. With ``--max-minutes`` everything is done by then: the schedule follows the clock.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from ... import endings
from .arguments import check_device, minutes, seed, threads
from .data import drawn_scenes
from .flow_presets import FLOW_PRESETS, FlowPreset
from .timebox import GRACE, TimeBox

__all__ = ["main", "train"]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fpe_pipeline.embedded.training.train_flow", description=__doc__)
    parser.add_argument("--preset", choices=FLOW_PRESETS, default="cpu")
    parser.add_argument("--work", type=Path, help="caches and checkpoints (default: runs/flow-PRESET)")
    parser.add_argument("--output", type=Path, help="where the model is written (default: WORK/model)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--threads", type=threads, help="CPU threads")
    parser.add_argument("--max-minutes", type=minutes, help="wall time for everything; the schedule follows")
    args = parser.parse_args(argv)
    box = TimeBox(args.max_minutes)
    check_device(parser, args.device)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    work = args.work or Path("runs") / f"flow-{args.preset}"
    output = args.output or work / "model"
    box.guard(GRACE, output)
    try:
        with endings.orderly():
            train(FLOW_PRESETS[args.preset], work, output, seed=args.seed, device=args.device, box=box)
    except KeyboardInterrupt as interruption:
        return endings.tell(interruption, parser.prog, "; run it again to go on")
    box.release()
    return 0


def train(
    preset: FlowPreset,
    work: Path,
    output: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    box: TimeBox | None = None,
    stop_after: int | None = None,
) -> dict[str, Any] | None:
    """Train what is not trained yet, export it and measure it.

    Args:
        preset: sizes and the schedule.
        work: folder for caches and the checkpoint.
        output: folder the model is written to.
        seed: of everything that is drawn or initialised.
        device: a torch device name.
        box: the wall time that all of this may take.
        stop_after: leave after this many steps.

    Returns:
        The measurements that were exported, or ``None`` if it left early.
    """
    box = box or TimeBox(None)
    # The scenes are drawn while torch and diffusers are still being imported.
    with drawn_scenes(work, preset.scenes, preset.held_out, preset.size, seed) as (drawn, held):
        from .flow_stages import run

        box.mark("imports")
        options: dict[str, Any] = {"seed": seed, "device": device, "box": box, "stop_after": stop_after}
        return run(preset, work, output, drawn, held, **options)


if __name__ == "__main__":
    sys.exit(main())
