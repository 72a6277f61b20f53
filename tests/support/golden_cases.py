"""Loading of tests/golden: the tiny pipeline, and the cases that the original code computed."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

GOLDEN = Path(__file__).parents[1] / "golden"
# Free-Prompt-Editing of generated images: noise in, latents out.
CASES = sorted(
    path.stem
    for path in (GOLDEN / "cases").glob("fpe_*.json")
    if "inversion_guidance" not in json.loads(path.read_text())
)

# An independent fused implementation lands at 0.07 of the suggested tolerance.
TOLERANCE = 0.25


@dataclass(frozen=True)
class GoldenCase:
    """Settings (JSON) and tensors (safetensors) of a case."""

    name: str
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def latents(self) -> torch.Tensor:
        """The shared start noise, a row for each prompt."""
        return self.tensors["in.start_latents"].expand(len(self.settings["prompts"]), -1, -1, -1)

    def call(self, pipe: Any, **kwargs: Any) -> Any:
        """The case's pipeline call."""
        return pipe(
            self.settings["prompts"],
            num_inference_steps=self.settings["steps"],
            guidance_scale=self.settings["guidance_scale"],
            **({} if "latents" in kwargs else {"latents": self.latents.to(pipe.unet.dtype)}),
            **{"output_type": "latent", **kwargs},
        )

    def atol(self, tensor: str) -> float:
        return TOLERANCE * self.settings["suggested_atol"][tensor]


class OriginalNoiseLevels(TorchFunctionMode):
    """Within it, schedulers compute with the noise levels that the original ran with, whatever the CPU.

    They hold them in float32 whatever the model's dtype; some CPUs round 6e-8 of them elsewhere, and others their
    square roots: 3e-6 in the latents of a run that is otherwise in float64.
    """

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        recorded = load_file(GOLDEN / "models" / "noise_levels.safetensors")
        torch.testing.assert_close(scheduler.alphas_cumprod, recorded["alphas_cumprod"], rtol=1e-5, atol=0)
        torch.testing.assert_close(recorded["numbers"].sqrt(), recorded["roots"], rtol=1e-6, atol=0)
        scheduler.alphas_cumprod = recorded["alphas_cumprod"]
        self.roots = dict(zip(recorded["numbers"].tolist(), recorded["roots"], strict=True))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__pow__, torch.Tensor.pow) and args[1] == 0.5 and args[0].dtype == torch.float32:
            return self.roots[args[0].item()]
        return function(*args, **(kwargs or {}))


def source_image() -> torch.Tensor:
    """The picture of the cases with a real image: uint8 [256, 256, 3]."""
    return load_file(GOLDEN / "models" / "source_image_256.safetensors")["source_image_u8"]


@cache
def load_case(name: str) -> GoldenCase:
    folder = GOLDEN / "cases"
    settings = json.loads((folder / f"{name}.json").read_text())
    return GoldenCase(name, settings, load_file(folder / f"{name}.safetensors"))


def load_pipeline(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The tiny pipeline with the scheduler that the original scripts build."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipe = StableDiffusionPipeline.from_pretrained(GOLDEN / "models" / "tiny-sd15").to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
