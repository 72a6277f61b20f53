"""Rebuild the embedded model end to end: ``python -m fpe_pipeline.models.train --preset cpu``.

Scenes are rendered, the autoencoder learns them, their latents are cached, UNet and text encoder learn the latents,
the judge learns the renders, everything is measured and exported. Each stage leaves its result in ``--work``; a run
that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import autoencoder, data, judge, scenes
from .diffusion import Denoiser, build_text_encoder, build_unet, train_diffusion, warm_text_encoder
from .export import export
from .loop import Fit
from .measure import measure_generation
from .tokenizer import MAX_LENGTH, build_tokenizer

__all__ = ["PRESETS", "Preset", "main", "train"]

log = logging.getLogger(__name__)

_WORDINGS = 4
_SHARES = {"autoencoder": 0.2, "diffusion": 0.75, "judge": 0.05}


@dataclass(frozen=True)
class Preset:
    """Everything that a training depends on, apart from its seed.

    Attributes:
        name: what it is called on the command line.
        size: pixels a side.
        scenes: renders to train on.
        latents: how many of them the diffusion model sees.
        held_out: renders of held-out triples to measure on.
        autoencoder, diffusion, judge: the three schedules.
        channels: the UNet's width at each level.
        generated: pictures to draw when the model is measured.
        steps: denoising steps of each.
    """

    name: str
    size: int
    scenes: int
    latents: int
    held_out: int
    autoencoder: Fit
    diffusion: Fit
    judge: Fit
    channels: tuple[int, ...] = (64, 128)
    generated: int = 512
    steps: int = 25


PRESETS: dict[str, Preset] = {
    "cpu": Preset(
        name="cpu",
        size=80,
        scenes=16000,
        latents=16000,
        held_out=1024,
        autoencoder=Fit(steps=3488, batch=16, learning_rate=2e-3, warmup=100, tail=0.6, ema=0.995),
        diffusion=Fit(steps=7377, batch=16, learning_rate=1e-3, warmup=100, ema=0.998),
        judge=Fit(steps=550, batch=32, learning_rate=2e-3, ema=0.99),
    ),
    "gpu": Preset(
        name="gpu",
        size=128,
        scenes=100_000,
        latents=100_000,
        held_out=2048,
        autoencoder=Fit(steps=20_000, batch=64, learning_rate=1e-3, warmup=200, tail=0.6, ema=0.999),
        diffusion=Fit(steps=60_000, batch=128, learning_rate=8e-4, warmup=500, ema=0.9995),
        judge=Fit(steps=5000, batch=64, learning_rate=2e-3, ema=0.99),
    ),
    "smoke": Preset(
        name="smoke",
        size=64,
        scenes=24,
        latents=24,
        held_out=8,
        autoencoder=Fit(steps=4, batch=4, ema=0.9),
        diffusion=Fit(steps=4, batch=4, ema=0.9),
        judge=Fit(steps=4, batch=4, ema=0.9),
        channels=(32, 64),
        generated=2,
        steps=2,
    ),
}


def train(
    preset: Preset,
    work: Path,
    output: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    max_minutes: float | None = None,
    stop_after: int | None = None,
) -> dict[str, object] | None:
    """Run every stage that is not finished yet and export the result.

    Args:
        preset: sizes and schedules.
        work: folder for caches and checkpoints.
        output: folder the model is written to.
        seed: of everything that is drawn or initialised.
        device: a torch device name.
        max_minutes: training time to share among the three networks, where the schedules would take longer.
        stop_after: leave after this many steps of the first unfinished network.

    Returns:
        The measurements that were exported, or ``None`` if it left early.
    """
    if max_minutes is not None:
        limits = {name: replace(getattr(preset, name), max_minutes=max_minutes * s) for name, s in _SHARES.items()}
        preset = replace(preset, **limits)
    workers = os.cpu_count() or 1 if preset.scenes > 1000 else 1
    drawn = data.render_cache(work / "scenes", preset.scenes, preset.size, seed=seed, workers=workers)
    held = data.render_cache(work / "held_out", preset.held_out, preset.size, seed=seed + 1, held=True)
    options: dict[str, Any] = {"seed": seed, "stop_after": stop_after}

    torch.manual_seed(seed)
    vae = autoencoder.build_autoencoder(preset.size).to(device)
    if not autoencoder.train_autoencoder(vae, drawn, preset.autoencoder, work / "autoencoder.pt", **options):
        return None
    autoencoder.standardise(vae, drawn.images[:512])
    latents = _latents(vae, drawn.images[: preset.latents], work / "latents.pt")

    tokenizer = build_tokenizer(work / "tokenizer")
    tokens, empty = _tokens(tokenizer, drawn.scenes[: preset.latents], seed)
    torch.manual_seed(seed)
    text_encoder = build_text_encoder(tokenizer)
    unet = build_unet(latents.shape[-1], preset.channels, context=text_encoder.config.hidden_size)
    denoiser = Denoiser(unet, text_encoder).to(device)
    checkpoint = work / "diffusion.pt"
    if not checkpoint.exists():
        truth = judge.labels(drawn)[: preset.latents]
        warm = warm_text_encoder(text_encoder, tokens, truth, steps=min(300, preset.diffusion.steps), seed=seed)
        log.info("text encoder: tells captions apart to %.2f nats", warm)
    if not train_diffusion(denoiser, latents, tokens, empty, preset.diffusion, checkpoint, **options):
        return None

    torch.manual_seed(seed)
    referee = judge.Judge(preset.size).to(device)
    if not judge.train_judge(referee, drawn, preset.judge, work / "judge.pt", **options):
        return None

    figures: dict[str, object] = {
        "training": {
            "preset": preset.name,
            "scenes": preset.scenes,
            "latents": preset.latents,
            "autoencoder_steps": preset.autoencoder.steps,
            "autoencoder_renders": [{"pixels": preset.size, "steps": preset.autoencoder.steps}],
            "diffusion_steps": preset.diffusion.steps,
            "diffusion_batch": preset.diffusion.batch,
        },
        "autoencoder": autoencoder.measure_autoencoder(vae, held.images),
        "judge": judge.measure_judge(referee, held),
    }
    parts = {"vae": vae, "denoiser": denoiser, "tokenizer": tokenizer, "judge": referee}
    export(output, **parts, measurements=figures)
    # Measured on what was written, so that the figures are those of the shipped float16 weights.
    figures["generated"] = measure_generation(output, preset.generated, steps=preset.steps, seed=seed, device=device)
    size = export(output, **parts, measurements=figures)
    log.info("wrote %s: %s bytes", output, f"{size:,}")
    return figures


def _latents(vae: torch.nn.Module, images: np.ndarray, path: Path) -> torch.Tensor:
    if not path.exists():
        log.info("encoding %d scenes", len(images))
        torch.save(autoencoder.encode_all(vae, images), path)
    return torch.load(path, weights_only=True)


def _tokens(tokenizer: object, drawn: list[scenes.Scene], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of several wordings of each scene, ``[n, k, length]``, and of the empty caption, ``[length]``."""
    captions = [
        scenes.caption(scene, np.random.default_rng((seed + 7, index, wording)))
        for index, scene in enumerate(drawn)
        for wording in range(_WORDINGS)
    ]
    ids = torch.tensor(tokenizer([*captions, ""], padding="max_length", max_length=MAX_LENGTH).input_ids)  # type: ignore[operator]
    return ids[:-1].view(len(drawn), _WORDINGS, MAX_LENGTH), ids[-1]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fpe_pipeline.models.train", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--work", type=Path, help="caches and checkpoints (default: runs/PRESET)")
    parser.add_argument("--output", type=Path, help="where the model is written (default: WORK/model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="torch device (default: cuda for the gpu preset, else cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--max-minutes", type=float, help="training time, where the preset would take longer")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if args.preset == "gpu" else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"device {device} asked for, but torch finds no CUDA device; --device cpu trains slowly")
    work = args.work or Path("runs") / args.preset
    train(
        PRESETS[args.preset],
        work,
        args.output or work / "model",
        seed=args.seed,
        device=device,
        max_minutes=args.max_minutes,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
