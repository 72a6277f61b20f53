"""What other tools' own code computed through the surfaces that their users call (tests/golden/README.md).

The repository holds a part of each tensor; the environment variable ``FPE_GOLDEN`` names a folder of the whole.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from tests.support.golden_cases import GOLDEN, TOLERANCE

FOLDER = Path(os.environ.get("FPE_GOLDEN", GOLDEN))
PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "tiny-sd15": StableDiffusionPipeline,
    "tiny-sdxl": StableDiffusionXLPipeline,
    "tiny-sd3": StableDiffusion3Pipeline,
    "tiny-flux": FluxPipeline,
}
DDIM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class DropinCase:
    """A case of another tool: its settings (JSON) and tensors (safetensors)."""

    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def outputs(self) -> list[str]:
        """Names of what the tool's surface returned."""
        return [name.removeprefix("out.") for name in self.tensors if name.startswith("out.")]

    def start(self, rows: int) -> torch.Tensor:
        """The start noise, for so many rows."""
        given = self.tensors["in.start_latents"]
        return given.expand(rows, *given.shape[1:]).clone()

    def miss(self, name: str, found: torch.Tensor) -> float:
        """How far a tensor is from the original's, in tolerances: 1 is the farthest that passes."""
        expected = self.tensors[f"out.{name}"]
        for axis, step in enumerate(self.settings.get("kept_every", {}).get(name, ())):
            found = found[(slice(None),) * axis + (slice(None, None, step),)]
        assert found.shape == expected.shape, (name, found.shape, expected.shape)
        tolerance = TOLERANCE * self.settings["suggested_atol"][name]
        return float((found.double() - expected.double()).abs().max()) / tolerance


@cache
def load_dropin(name: str) -> DropinCase:
    """The case ``dropin_<name>``."""
    path = FOLDER / "cases" / f"dropin_{name}"
    return DropinCase(json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors")))


def load_dropin_pipeline(model: str, *, ddim: bool = True) -> Any:
    """A tiny pipeline in float32; all tokenizers are the tiny CLIP tokenizer."""
    tokenizers = {}
    for number in range(1, 4):
        name = "tokenizer" if number == 1 else f"tokenizer_{number}"
        index = json.loads((FOLDER / "models" / model / "model_index.json").read_text())
        if name in index:
            tokenizers[name] = CLIPTokenizer.from_pretrained(FOLDER / "models" / "tiny-sd15" / "tokenizer")
    pipe = PIPELINES[model].from_pretrained(FOLDER / "models" / model, **tokenizers)
    pipe.to(dtype=torch.float32).set_progress_bar_config(disable=True)
    if ddim:
        pipe.scheduler = DDIMScheduler(**DDIM)
    return pipe
