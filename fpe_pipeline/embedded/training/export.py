"""Writing the trained networks as a diffusers folder that any installation of diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from ...atomic_folder import write_text
from .. import JUDGE
from ..card import CARD, MEASUREMENTS, render_card
from ..judge import Judge, save_judge
from .diffusion import Denoiser, build_scheduler
from .tokenizer import build_tokenizer
from .whole_model import whole_model

__all__ = [
    "SIZE_LIMIT",
    "check_folder",
    "check_size",
    "declare_float32",
    "edit_json",
    "export",
    "folder_bytes",
    "forget_origin",
    "half",
    "write_measurements",
]

SIZE_LIMIT = 12_000_000
_SETTINGS = 100_000  # bytes of everything but the weights, rounded up


def export(
    folder: Path,
    *,
    vae: AutoencoderKL,
    denoiser: Denoiser,
    tokenizer: CLIPTokenizer,
    judge: Judge,
    measurements: dict[str, object],
) -> int:
    """Write a float16 ``StableDiffusionPipeline`` folder, the judge, the measurements and the model card.

    The networks are left as they are; the pipeline is written from float16 copies.

    Returns:
        Bytes written.

    Raises:
        ValueError: the model is larger than :data:`SIZE_LIMIT`; what the folder held is left as it is.
    """
    pipe = StableDiffusionPipeline(
        vae=half(vae),
        text_encoder=half(denoiser.text_encoder),
        tokenizer=tokenizer,
        unet=half(denoiser.unet),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with whole_model(folder) as written:
        pipe.save_pretrained(written, safe_serialization=True)
        edit_json(written / "text_encoder" / "config.json", declare_float32)
        for path in written.glob("*/config.json"):
            edit_json(path, forget_origin)
        # Newer transformers write tokenizer.json alone; older ones read vocab.json and merges.txt.
        build_tokenizer(written / "tokenizer")
        save_judge(judge, written / JUDGE)
        write_measurements(written, measurements)
        return check_folder(written, folder, SIZE_LIMIT)


def write_measurements(folder: Path, measurements: dict[str, object]) -> None:
    """Write the measurements, and the card that shows them, into a model's folder."""
    write_text(folder / MEASUREMENTS, json.dumps(measurements, indent=2) + "\n")
    write_text(folder / CARD, render_card(folder))


def check_size(*modules: torch.nn.Module) -> None:
    """See before a training that its result may be shipped.

    Raises:
        ValueError: the weights alone take more than :data:`SIZE_LIMIT`.
    """
    size = sum(2 * parameter.numel() for module in modules for parameter in module.parameters())
    if size > SIZE_LIMIT - _SETTINGS:
        raise ValueError(f"weights of {size:,} bytes leave no room for settings within {SIZE_LIMIT:,}; use less width")


def half(module: Any) -> torch.nn.Module:
    """A float16 copy, made through the configuration so that the original keeps its precision."""
    state = {name: value.detach().cpu().half() for name, value in module.state_dict().items()}
    config = module.config
    copy = type(module).from_config(config) if hasattr(type(module), "from_config") else type(module)(config)
    copy.half().load_state_dict(state)
    return copy.eval()


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a file's dictionary in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n")


def declare_float32(config: dict[str, Any]) -> None:
    """Have transformers load the text encoder in float32 unless told otherwise, as diffusers loads its models.

    Left to itself, transformers takes the stored precision, and the pipeline's parts would not fit together.
    """
    config["dtype"] = "float32"


def forget_origin(config: dict[str, Any]) -> None:
    """Drop the folder that a network was loaded from, which means nothing on another machine."""
    config.pop("_name_or_path", None)


def check_folder(written: Path, folder: Path, limit: int) -> int:
    """Bytes of a model that is to become ``folder``; raises ``ValueError`` where they pass the limit."""
    size = folder_bytes(written)
    if size > limit:
        raise ValueError(f"{folder} would take {size:,} bytes, more than the {limit:,} that may be shipped")
    return size


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
