"""Train the embedded transformer: ``python -m fpe_pipeline.embedded.training.train_flow --preset cpu``.

Scenes are rendered and encoded by the embedded model's autoencoder; transformer and text encoders learn the latents by
flow matching; the result is exported as a Stable Diffusion 3 pipeline and measured. A run that was stopped continues
where it was. With ``--max-minutes`` everything is done by then: the schedule follows the clock.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel

from ...atomic_folder import replaced
from .. import embedded_path
from .arguments import check_device, minutes, seed, threads
from .autoencoder import encode_all
from .captions import Captions
from .data import SceneCache, render_cache
from .flow import FlowDenoiser, build_projecting_encoder, build_transformer, train_flow
from .flow_export import export_flow, measure_flow, measure_renders
from .flow_presets import FLOW_PRESETS, FlowPreset
from .images import picture_tensor
from .loop import Fitted
from .timebox import TimeBox
from .tokenizer import build_tokenizer

__all__ = ["main", "train"]

log = logging.getLogger(__name__)


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
    check_device(parser, args.device)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if args.threads:
        torch.set_num_threads(args.threads)
    work = args.work or Path("runs") / f"flow-{args.preset}"
    preset, box = FLOW_PRESETS[args.preset], TimeBox(args.max_minutes)
    train(preset, work, args.output or work / "model", seed=args.seed, device=args.device, box=box)
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
    cache = render_cache(work / "scenes", preset.scenes, preset.size, seed=seed)
    vae = AutoencoderKL.from_pretrained(embedded_path(), subfolder="vae").to(device)
    latents = _latents(vae, cache, work / "latents.pt").to(device)
    box.mark("latents")
    tokenizer = build_tokenizer(work / "tokenizer")
    torch.manual_seed(seed)
    denoiser = _denoiser(preset, tokenizer, 2 ** (len(vae.config.block_out_channels) - 1)).to(device)
    deadline = math.inf if not box.limited else box.end - preset.review * box.total
    options: dict[str, Any] = {"seed": seed, "stop_after": stop_after, "deadline": deadline}
    labels = torch.from_numpy(cache.labels).to(device)
    fitted = train_flow(
        denoiser, latents, labels, Captions(tokenizer, device), preset.flow, work / "flow.pt", **options
    )
    box.mark("flow")
    if not fitted:
        return None
    held = render_cache(work / "held_out", preset.held_out, preset.size, seed=seed + 1, held=True)
    figures = {"training": _record(preset, fitted, box, device), **measure_renders(vae, held, device)}
    size = export_flow(output, vae=vae, denoiser=denoiser, shift=preset.shift, measurements=figures)
    log.info("wrote %s: %s bytes", output, f"{size:,}")
    measure_flow(output, preset, figures, device=device, seed=seed)
    box.mark("review")
    return figures


def _record(preset: FlowPreset, fitted: Fitted, box: TimeBox, device: str) -> dict[str, Any]:
    record: dict[str, Any] = {
        "preset": preset.name,
        "scenes": preset.scenes,
        "steps": fitted.steps,
        "batch": preset.flow.batch,
        "minutes": round(fitted.minutes, 1),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
    }
    return {**record, "max_minutes": round(box.total / 60, 3)} if box.limited else record


def _denoiser(preset: FlowPreset, tokenizer: Any, factor: int) -> FlowDenoiser:
    """Untrained, but for the first text encoder, which is the embedded model's with a projection."""
    trained = CLIPTextModel.from_pretrained(embedded_path(), subfolder="text_encoder")
    first = build_projecting_encoder(tokenizer, trained.config.hidden_size, trained.config.num_hidden_layers)
    first.load_state_dict({**first.state_dict(), **_named_as(first, trained)})
    second = build_projecting_encoder(tokenizer, preset.second)
    width = first.config.projection_dim + second.config.projection_dim
    transformer = build_transformer(preset.size // factor, width, layers=preset.layers, heads=preset.heads)
    return FlowDenoiser(transformer, first, second)


def _named_as(first: torch.nn.Module, trained: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A text model's state by the names of the same with a projection, which differ between transformers' versions."""
    wanted, state = first.state_dict(), trained.state_dict()
    bare = {name.removeprefix("text_model."): value for name, value in state.items()}
    return {name: bare[name.removeprefix("text_model.")] for name in wanted if not name.startswith("text_projection")}


def _latents(vae: AutoencoderKL, cache: SceneCache, path: Path) -> torch.Tensor:
    """Posteriors of all scenes, kept in a file."""
    if path.exists():
        kept: torch.Tensor = torch.load(path, weights_only=True)
        return kept
    log.info("encoding %d scenes", len(cache))
    latents = encode_all(vae, picture_tensor(cache.images).permute(0, 3, 1, 2)).cpu()
    with replaced(path) as partial:
        torch.save(latents, partial)
    return latents


if __name__ == "__main__":
    sys.exit(main())
