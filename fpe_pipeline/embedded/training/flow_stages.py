"""What a training of the embedded transformer does; see :mod:`fpe_pipeline.embedded.training.train_flow`."""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel

from ...atomic_folder import replaced
from .. import embedded_path
from .autoencoder import encode_all
from .captions import Captions
from .data import Rendering
from .flow import FlowDenoiser, build_projecting_encoder, build_transformer, train_flow
from .flow_export import export_flow, measure_flow, measure_renders, write_flow_measurements
from .flow_presets import FlowPreset
from .images import picture_tensor
from .loop import Fitted
from .timebox import TimeBox
from .tokenizer import build_tokenizer

__all__ = ["kept_latents", "posteriors", "run"]

log = logging.getLogger(__name__)

_ENOUGH = 1024  # scenes that training against the clock does not do without
_DRAWING, _ENCODING = 0.2, 0.4  # of a time box: what is not drawn, or encoded, by then stays so
_TOGETHER = 32  # pictures that are encoded at a time


def run(
    preset: FlowPreset,
    work: Path,
    output: Path,
    drawn: Rendering,
    held: Rendering,
    *,
    seed: int,
    device: str,
    box: TimeBox,
    stop_after: int | None,
) -> dict[str, Any] | None:
    """Everything that is not finished yet; arguments as of :func:`~.train_flow.train`, ``None`` where it left early."""
    vae = AutoencoderKL.from_pretrained(embedded_path(), subfolder="vae").to(device)
    latents, labels = posteriors(preset, vae, drawn, work / "latents.pt", seed, box)
    box.mark("latents")
    tokenizer = build_tokenizer(work / "tokenizer")
    torch.manual_seed(seed)
    denoiser = _denoiser(preset, tokenizer, 2 ** (len(vae.config.block_out_channels) - 1)).to(device)
    deadline = math.inf if not box.limited else box.end - preset.review * box.total
    options: dict[str, Any] = {"seed": seed, "stop_after": stop_after, "deadline": deadline}
    where = (latents.to(device), labels.to(device), Captions(tokenizer, device))
    fitted = train_flow(denoiser, *where, preset.flow, work / "flow.pt", **options)
    box.mark("flow")
    if not fitted:
        return None
    figures: dict[str, Any] = {"training": _record(preset, len(latents), fitted, box, device)}
    # First the model: what is measured of it may be more than the time that is left.
    size = export_flow(output, vae=vae, denoiser=denoiser, shift=preset.shift, measurements=figures)
    log.info("wrote %s: %s bytes", output, f"{size:,}")
    box.mark("export")
    held.wait()
    figures |= measure_renders(vae, held.cache, device)
    write_flow_measurements(output, figures)
    measure_flow(output, preset, figures, device=device, seed=seed)
    box.mark("review")
    return figures


def _record(preset: FlowPreset, scenes: int, fitted: Fitted, box: TimeBox, device: str) -> dict[str, Any]:
    record: dict[str, Any] = {
        "preset": preset.name,
        "scenes": scenes,
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


def posteriors(
    preset: FlowPreset, vae: AutoencoderKL, drawn: Rendering, path: Path, seed: int, box: TimeBox
) -> tuple[torch.Tensor, torch.Tensor]:
    """Posteriors of the scenes, all of them or those that there is time for, and their labels, kept in a file."""
    about = {"scenes": preset.scenes, "size": preset.size, "seed": seed, "autoencoder": _fingerprint(vae)}
    if (kept := kept_latents(path, about)) is not None:
        drawn.stop()
        return kept
    if box.limited:
        drawn.wait(_ENOUGH)
        drawn.wait(seconds=max(0.0, _DRAWING * box.total - (box.total - box.left)))
        drawn.stop()
    else:
        drawn.wait()
    cache = drawn.cache.first(drawn.ready)
    log.info("encoding %d scenes", len(cache))
    parts = []
    for start in range(0, len(cache), _TOGETHER):
        if start and box.limited and box.left < (1 - _ENCODING) * box.total:
            break
        parts.append(encode_all(vae, picture_tensor(cache.images[start : start + _TOGETHER]).permute(0, 3, 1, 2)).cpu())
    latents = torch.cat(parts)
    labels = torch.from_numpy(np.array(cache.first(len(latents)).labels))
    with replaced(path) as partial:
        torch.save({"latents": latents, "labels": labels, "about": about}, partial)
    return latents, labels


def kept_latents(path: Path, about: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Latents and labels that an earlier call kept; ``None`` where there are none, or where they do not say of what.

    Raises:
        ValueError: they are of other scenes, or of another autoencoder.
    """
    if not path.exists():
        return None
    kept = torch.load(path, weights_only=True)
    if not isinstance(kept, dict):
        return None
    if kept["about"] != about:
        raise ValueError(
            f"{path} holds latents of {kept['about']}, not of {about}: choose another work folder, since what is "
            "trained on these does not know others"
        )
    return kept["latents"], kept["labels"]


def _fingerprint(vae: AutoencoderKL) -> str:
    digest = hashlib.sha256()
    for value in vae.state_dict().values():
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
