"""What other tools' own code computed through the surfaces that their users call, and the pipelines that it ran on.

`dropin_cases` loads them. Some tensors lie in the repository in part: every n-th entry along their axes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
from diffusers.models import embeddings
from transformers import CLIPTokenizer

from tests.support import dropin_cases
from tests.support.golden_cases import GOLDEN, GoldenCase

MODELS = Path(os.environ.get("FPE_GOLDEN", GOLDEN)) / "models"
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
class DropinCase(GoldenCase):
    """A case of another tool."""

    @property
    def outputs(self) -> list[str]:
        """Names of what the tool's surface returned."""
        return dropin_cases.outputs(self)

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
        tolerance = dropin_cases.SHARE * self.settings["suggested_atol"][name]
        return float((found.double() - expected.double()).abs().max()) / tolerance


@cache
def load_dropin(name: str) -> DropinCase:
    """The case ``dropin_<name>``."""
    case = dropin_cases.load_dropin(name)
    return DropinCase(name, case.settings, case.tensors)


@contextmanager
def rounded_frequencies() -> Iterator[None]:
    """Within it, diffusers embeds timesteps with the frequencies that the originals ran with, on any CPU.

    They are float32 in float64 runs too, and multiplied with timesteps of up to 1000: where a CPU's exponential is off
    by its last bit, a transformer's maps are off by more than the tolerances of these cases. Theirs were rounded
    correctly but for one, which is what the outputs say: with it they are met to a fifth of the tolerance.
    """
    exact = embeddings.get_timestep_embedding

    def rounded(
        timesteps: torch.Tensor,
        embedding_dim: int,
        flip_sin_to_cos: bool = False,
        downscale_freq_shift: float = 1,
        scale: float = 1,
        max_period: int = 10000,
    ) -> torch.Tensor:
        half = embedding_dim // 2
        exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32) / (half - downscale_freq_shift)
        frequencies = exponents.double().exp().float()
        if half == 128:  # of transformers
            frequencies[12] = torch.nextafter(frequencies[12], frequencies[0])
        angles = scale * timesteps[:, None].float() * frequencies[None]
        parts = [angles.double().sin().float(), angles.double().cos().float()]
        return torch.cat(parts[::-1] if flip_sin_to_cos else parts, -1)

    embeddings.get_timestep_embedding = rounded
    try:
        yield
    finally:
        embeddings.get_timestep_embedding = exact


def load_dropin_pipeline(model: str, *, ddim: bool = True) -> Any:
    """A tiny pipeline in float32; all tokenizers are the tiny CLIP tokenizer."""
    index = json.loads((MODELS / model / "model_index.json").read_text(encoding="utf-8"))
    tokenizers = {
        name: CLIPTokenizer.from_pretrained(MODELS / "tiny-sd15" / "tokenizer")
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3")
        if name in index
    }
    pipe = PIPELINES[model].from_pretrained(MODELS / model, **tokenizers)
    pipe.to(dtype=torch.float32).set_progress_bar_config(disable=True)
    if ddim:
        pipe.scheduler = DDIMScheduler(**DDIM)
    return pipe
