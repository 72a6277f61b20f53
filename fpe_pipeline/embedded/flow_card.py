"""The embedded transformer's model card, rendered from what lies beside it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .card import MEASUREMENTS, WIDTH, card_point, card_rows
from .scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS, prompt, triples

__all__ = ["render_flow_card"]


def render_flow_card(folder: Path) -> str:
    """The card of the transformer in a folder: no figure in it is typed by hand."""
    figures = json.loads((folder / MEASUREMENTS).read_text(encoding="utf-8"))
    about = (
        f"A tiny Stable Diffusion 3, trained from scratch on the embedded model's scenes: one of {len(OBJECTS)} "
        f"objects in one of {len(COLOURS)} colours before one of {len(BACKGROUNDS)} backgrounds. It exists to show and "
        "to *measure* edits of joint attention where there is no hub and no GPU. It is not a general image model, and "
        "it draws less surely than the embedded UNet: its figures are below, as they came out."
    )
    held = len(triples(held=True))
    points = {
        "Networks": _networks(folder),
        "Text": "Two text encoders and no T5, in whose place diffusers puts zeros: training held pictures independent "
        "of how many (`max_sequence_length`), and a small number is faster.",
        "Scheduler": _scheduler(folder),
        "Data": f"Drawn by `fpe_pipeline.embedded.scenes`; {held} of the {len(triples())} (object, colour, background) "
        "triples are held out of training. No photograph, no person and no outside data set is involved.",
        "Judge": "The embedded model's. Its own error on what the autoencoder gives back of held-out renders of this "
        "size stands beside the figures that it helps to produce.",
        "Rebuild": _rebuild(figures["training"]),
    }
    return _TEMPLATE.format(
        about=textwrap.fill(about, WIDTH, break_on_hyphens=False),
        prompt=prompt("car", "red", "beach"),
        options=_options(figures.get("generated", {})),
        points="\n".join(card_point(name, text) for name, text in points.items()),
        rows=card_rows(figures),
    )


def _options(generated: Mapping[str, Any]) -> str:
    named = {"steps": "num_inference_steps", "guidance_scale": "guidance_scale"}
    return "".join(f", {named[name]}={generated[name]:g}" for name in named if name in generated)


def _config(folder: Path, part: str) -> dict[str, Any]:
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    config: dict[str, Any] = json.loads((folder / part / file).read_text(encoding="utf-8"))
    return config


def _networks(folder: Path) -> str:
    transformer, vae = _config(folder, "transformer"), _config(folder, "vae")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    side = transformer["sample_size"] // transformer["patch_size"]
    return (
        f"`SD3Transformer2DModel` with {transformer['num_layers']} blocks of {transformer['num_attention_heads']} "
        f"heads of {transformer['attention_head_dim']}, {side} × {side} image tokens for pictures of "
        f"{factor * transformer['sample_size']} pixels a side; the embedded model's `AutoencoderKL`; two "
        "`CLIPTextModelWithProjection`, the first begun as the embedded model's. Weights are float16 safetensors."
    )


def _scheduler(folder: Path) -> str:
    config = _config(folder, "scheduler")
    return f"`{config['_class_name']}` with a shift of {config['shift']:g}; trained at logit-normal times."


def _rebuild(training: Mapping[str, Any]) -> str:
    box = f" --max-minutes {training['max_minutes']:g}" if "max_minutes" in training else ""
    text = f"`python -m fpe_pipeline.embedded.training.train_flow --preset {training['preset']}{box}`."
    return f"{text} {training['note']}" if "note" in training else text


_TEMPLATE = """# Embedded scenes transformer

{about}

```python
from diffusers import StableDiffusion3Pipeline
from fpe_pipeline.models import embedded_path

folder = embedded_path("embedded-sd3")
pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
pipe("{prompt}"{options}).images[0]
```

{points}

## Measured

Written by the export from `measurements.json`.

| figure | value |
|---|---|
{rows}
"""
