"""Writing the trained networks as a diffusers folder that any installation of diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from .diffusion import Denoiser, build_scheduler
from .judge import Judge, save_judge
from .tokenizer import build_tokenizer

__all__ = ["MEASUREMENTS", "SIZE_LIMIT", "export", "folder_bytes", "write_card"]

SIZE_LIMIT = 12_000_000
MEASUREMENTS = "measurements.json"
_CARD, _JUDGE = "MODEL_CARD.md", "judge.safetensors"


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
        ValueError: the folder is larger than :data:`SIZE_LIMIT`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline(
        vae=_half(vae),
        text_encoder=_half(denoiser.text_encoder),
        tokenizer=tokenizer,
        unet=_half(denoiser.unet),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    _declare_float32(folder / "text_encoder" / "config.json")
    # Newer transformers write tokenizer.json alone; older ones read vocab.json and merges.txt.
    build_tokenizer(folder / "tokenizer")
    save_judge(judge, folder / _JUDGE)
    (folder / MEASUREMENTS).write_text(json.dumps(measurements, indent=2) + "\n")
    write_card(folder)
    size = folder_bytes(folder)
    if size > SIZE_LIMIT:
        raise ValueError(f"{folder} takes {size:,} bytes, more than the {SIZE_LIMIT:,} that may be shipped")
    return size


def _half(module: Any) -> torch.nn.Module:
    """A float16 copy, made through the configuration so that the original keeps its precision."""
    state = {name: value.detach().cpu().half() for name, value in module.state_dict().items()}
    config = module.config
    copy = type(module).from_config(config) if hasattr(type(module), "from_config") else type(module)(config)
    copy.half().load_state_dict(state)
    return copy.eval()


def _declare_float32(path: Path) -> None:
    """Have transformers load the text encoder in float32 unless told otherwise, as diffusers loads its models.

    Left to itself, transformers takes the stored precision, and the pipeline's parts would not fit together.
    """
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_card(folder: Path) -> None:
    """Write the model card from the folder's measurements: no figure in it is typed by hand."""
    figures = json.loads((folder / MEASUREMENTS).read_text())
    rows = "\n".join(f"| {name} | {_show(value)} |" for name, value in _flatten(figures))
    (folder / _CARD).write_text(_TEMPLATE.format(rows=rows))


def _flatten(figures: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in figures.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        rows += _flatten(value, f"{label}: ") if isinstance(value, dict) else [(label, value)]
    return rows


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


_TEMPLATE = """# Embedded scenes model

A tiny Stable Diffusion, trained from scratch on procedurally drawn scenes: one of 8 objects in one of 8 colours before
one of 5 backgrounds. It exists to show and to *measure* attention-map edits where there is no hub and no GPU: the
right answer to each edit is known. It is not a general image model: it knows the words of its captions and no others.

```python
from diffusers import StableDiffusionPipeline
from fpe_pipeline.models import embedded_path

pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
pipe("a photo of a red car on the beach", num_inference_steps=25, guidance_scale=5.0).images[0]
```

- **Words.** car, house, boat, rocket, balloon, mushroom, cat, fish; red, orange, yellow, green, blue, purple, pink,
  black; on the beach, in the desert, in the meadow, in the snow, in the city.
- **Networks.** `AutoencoderKL` with 4 channels at a quarter of the width and height, `UNet2DConditionModel` with
  self- and cross-attention at both of its levels, `CLIPTextModel`, `CLIPTokenizer`. Weights are float16 safetensors.
- **Scheduler.** `DDIMScheduler` with Stable Diffusion's noise levels and `prediction_type="v_prediction"`.
- **Data.** Drawn by `fpe_pipeline.models.scenes`; one in ten (object, colour, background) triples is held out of
  training. No photograph, no person and no outside data set is involved.
- **Judge.** `judge.safetensors` names object, colour and background of a picture and outlines the object. All
  accuracies below are the judge's, whose own error on held-out renders stands beside them.
- **Rebuild.** `python -m fpe_pipeline.models.train --preset cpu` (or `gpu`). The shipped weights are of the
  `cpu` preset with one difference: for its first 2,685 steps the autoencoder saw renders of 96 pixels, with objects of
  less varied size.

## Measured

Written by the export from `measurements.json`.

| figure | value |
|---|---|
{rows}
"""
