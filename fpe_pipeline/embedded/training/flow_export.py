"""Writing the trained transformer as a diffusers folder of Stable Diffusion 3, and measuring what was written."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from ...atomic_folder import write_text
from .. import judge_path
from ..card import CARD, MEASUREMENTS
from ..flow_card import render_flow_card
from ..judge import load_judge
from ..measure import measure_generation
from .autoencoder import measure_autoencoder, to_tensor
from .data import SceneCache
from .export import check_folder, declare_float32, edit_json, forget_origin, half
from .flow import FlowDenoiser, build_flow_scheduler
from .flow_presets import FlowPreset
from .tokenizer import build_tokenizer
from .whole_model import whole_model

__all__ = ["FLOW_SIZE_LIMIT", "export_flow", "measure_flow", "measure_renders"]

log = logging.getLogger(__name__)

FLOW_SIZE_LIMIT = 8 * 2**20


def export_flow(
    folder: Path, *, vae: AutoencoderKL, denoiser: FlowDenoiser, shift: float, measurements: dict[str, Any]
) -> int:
    """Write a float16 ``StableDiffusion3Pipeline`` folder without T5, the measurements and the model card.

    The networks are left as they are; the pipeline is written from float16 copies.

    Returns:
        Bytes written.

    Raises:
        ValueError: the model is larger than :data:`FLOW_SIZE_LIMIT`; what the folder held is left as it is.
    """
    autoencoder: Any = half(vae)
    autoencoder.register_to_config(shift_factor=0.0)  # which StableDiffusion3Pipeline adds without asking
    with whole_model(folder) as written:
        tokenizer = build_tokenizer(written / "tokenizer")
        pipe = StableDiffusion3Pipeline(
            transformer=half(denoiser.transformer),
            scheduler=build_flow_scheduler(shift),
            vae=autoencoder,
            text_encoder=half(denoiser.text_encoder),
            tokenizer=tokenizer,
            text_encoder_2=half(denoiser.text_encoder_2),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        pipe.save_pretrained(written, safe_serialization=True)
        for name in ("text_encoder", "text_encoder_2"):
            edit_json(written / name / "config.json", declare_float32)
        for path in written.glob("*/config.json"):
            edit_json(path, forget_origin)
        # Newer transformers write tokenizer.json alone; older ones read vocab.json and merges.txt.
        for name in ("tokenizer", "tokenizer_2"):
            build_tokenizer(written / name)
        write_flow_measurements(written, measurements)
        return check_folder(written, folder, FLOW_SIZE_LIMIT)


def write_flow_measurements(folder: Path, measurements: dict[str, Any]) -> None:
    """Write the measurements, and the card that shows them, into a model's folder."""
    write_text(folder / MEASUREMENTS, json.dumps(measurements, indent=2) + "\n")
    write_text(folder / CARD, render_flow_card(folder))


def measure_renders(vae: AutoencoderKL, held: SceneCache, device: str) -> dict[str, Any]:
    """What is lost before the transformer comes in: by the autoencoder, and by the judge on what it gives back.

    Args:
        vae: the embedded model's.
        held: renders of held-out triples, of the transformer's size.
        device: of the judge.
    """
    pixels = to_tensor(np.asarray(held.images), vae.device)
    with torch.no_grad():
        decoded = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pixels.split(32)]
    pictures = ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    verdict = load_judge(judge_path()).to(device).look(pictures)
    seen = {"object": verdict.objects, "colour": verdict.colours, "background": verdict.backgrounds}
    judged: dict[str, Any] = {
        name: float(
            np.mean([name_of == getattr(scene, name) for name_of, scene in zip(said, held.scenes, strict=True)])
        )
        for name, said in seen.items()
    }
    return {"autoencoder": measure_autoencoder(vae, held.images), "judge": {**judged, "images": len(held)}}


def measure_flow(folder: Path, preset: FlowPreset, figures: dict[str, Any], *, device: str, seed: int) -> None:
    """Measure what was written, so that the figures are those of the shipped float16 weights.

    Args:
        folder: of :func:`export_flow`.
        preset: says how many pictures, steps and which guidance.
        figures: receives ``"generated"``; all of them are written.
        device, seed: as of the training.
    """
    options: dict[str, Any] = {"steps": preset.steps, "guidance": preset.guidance, "seed": seed, "device": device}
    if preset.text_tokens is not None:
        options["max_sequence_length"] = preset.text_tokens
    half = {"torch_dtype": torch.float16} if device.startswith("cuda") else {}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, **half).to(device)
    figures["generated"] = measure_generation(folder, preset.generated, judge=judge_path(), pipe=pipe, **options)
    log.info("generated: %s", figures["generated"])
    write_flow_measurements(folder, figures)
