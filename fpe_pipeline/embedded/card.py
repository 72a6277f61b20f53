"""The model card, rendered from what lies beside it: measurements, the training's record and the networks' settings."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS, prompt, triples

__all__ = ["CARD", "MEASUREMENTS", "WIDTH", "card_point", "card_rows", "render_card"]

CARD, MEASUREMENTS = "MODEL_CARD.md", "measurements.json"
WIDTH = 118


def render_card(folder: Path) -> str:
    """The card of the model in a folder: no figure in it is typed by hand."""
    figures = _read(folder / MEASUREMENTS)
    caption, held = prompt("car", "red", "beach"), len(triples(held=True))
    about = (
        f"A tiny Stable Diffusion, trained from scratch on procedurally drawn scenes: one of {len(OBJECTS)} objects in "
        f"one of {len(COLOURS)} colours before one of {len(BACKGROUNDS)} backgrounds. It exists to show and to "
        "*measure* attention-map edits where there is no hub and no GPU: the right answer to each edit is known. It is "
        "not a general image model: it knows the words of its captions and no others."
    )
    points = {
        "Words": f"{', '.join(OBJECTS)}; {', '.join(COLOURS)}; {', '.join(map(_place, BACKGROUNDS))}.",
        "Networks": _networks(folder),
        "Scheduler": _scheduler(folder),
        "Data": f"Drawn by `fpe_pipeline.embedded.scenes`; {held} of the {len(triples())} (object, colour, background) "
        "triples are held out of training. No photograph, no person and no outside data set is involved.",
        "Judge": "`judge.safetensors` names object, colour and background of a picture and outlines the object. All "
        "accuracies below are the judge's, whose own error on held-out renders stands beside them.",
        "Rebuild": _rebuild(figures["training"]),
    }
    return _TEMPLATE.format(
        about=textwrap.fill(about, WIDTH, break_on_hyphens=False),
        call=", ".join([f'"{caption}"', *_options(figures.get("generated", {}))]),
        points="\n".join(card_point(name, text) for name, text in points.items()),
        rows=card_rows(figures),
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _place(background: str) -> str:
    plain = prompt("car", "red", background)
    return plain.removeprefix("a photo of a red car ")


def _options(generated: Mapping[str, Any]) -> list[str]:
    names = {"steps": "num_inference_steps", "guidance_scale": "guidance_scale"}
    return [f"{names[name]}={generated[name]}" for name in names if name in generated]


def _networks(folder: Path) -> str:
    vae, unet = (_read(folder / part / "config.json") for part in ("vae", "unet"))
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    crossed = sum("CrossAttn" in block for block in unet["down_block_types"])
    return (
        f"`AutoencoderKL` with {vae['latent_channels']} channels at 1/{factor} of the width and height, "
        f"`UNet2DConditionModel` with self- and cross-attention at {crossed} of its {len(unet['down_block_types'])} "
        f"levels, `CLIPTextModel`, `CLIPTokenizer`, for pictures of {factor * unet['sample_size']} pixels a side. "
        "Weights are float16 safetensors."
    )


def _scheduler(folder: Path) -> str:
    config = _read(folder / "scheduler" / "scheduler_config.json")
    return (
        f"`{config['_class_name']}` with Stable Diffusion's noise levels and "
        f'`prediction_type="{config["prediction_type"]}"`.'
    )


def _rebuild(training: Mapping[str, Any]) -> str:
    box = f" --max-minutes {training['max_minutes']:g}" if "max_minutes" in training else ""
    text = f"`python -m fpe_pipeline.embedded.training.train --preset {training['preset']}{box}`."
    stages: Sequence[Mapping[str, Any]] = training["autoencoder_renders"]
    if len(stages) > 1:
        said = [
            f"for {stage['steps']:,} steps on renders of {stage['pixels']} pixels"
            + (f" ({stage['note']})" if "note" in stage else "")
            for stage in stages
        ]
        text += (
            f" These weights differ from its outcome in one thing: the autoencoder was trained {', then '.join(said)}."
        )
    return text


def card_rows(figures: Mapping[str, Any]) -> str:
    """Measurements as rows of a table."""
    return "\n".join(f"| {name} | {_show(value)} |" for name, value in _flatten(figures))


def card_point(name: str, text: str) -> str:
    """A point of a card's list."""
    return textwrap.fill(
        f"- **{name}.** {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def _flatten(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in figures.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{label}: ")
        elif not isinstance(value, list):  # lists are told in words
            rows.append((label, value))
    return rows


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


_TEMPLATE = """# Embedded scenes model

{about}

```python
from diffusers import StableDiffusionPipeline
from fpe_pipeline.models import embedded_path

pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
pipe({call}).images[0]
```

{points}

## Measured

Written by the export from `measurements.json`.

| figure | value |
|---|---|
{rows}
"""
