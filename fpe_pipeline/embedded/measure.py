"""How well a model folder draws what its prompts say, as its judge sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from . import judge_path
from .judge import load_judge
from .scenes.scenes import prompt, triples

__all__ = ["draw", "measure_generation", "noise"]


def noise(shape: tuple[int, int, int], seeds: list[int]) -> torch.Tensor:
    """Starting latents ``[len(seeds), *shape]``, each from a CPU generator of its own: the same on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def draw(
    pipe: Any, prompts: list[str], seeds: list[int], *, steps: int, guidance: float, batch: int = 32, **options: Any
) -> list[Image.Image]:
    """One picture for each prompt and seed, many at a time.

    Args:
        pipe: a ``StableDiffusionPipeline`` or ``StableDiffusion3Pipeline``.
        prompts, seeds: as many of each.
        steps: of denoising.
        guidance: classifier-free guidance scale.
        batch: pictures at a time.
        **options: of the pipeline's call.
    """
    model = getattr(pipe, "unet", None) or pipe.transformer
    config = model.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    options = {"num_inference_steps": steps, "guidance_scale": guidance, **options}
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        latents = noise(shape, seeds[start : start + batch]).to(pipe.device, model.dtype)
        images += pipe(prompts[start : start + batch], latents=latents, **options).images
    return images


def measure_generation(
    folder: Path,
    count: int = 512,
    *,
    steps: int = 25,
    guidance: float = 5.0,
    seed: int = 0,
    device: str = "cpu",
    batch: int = 32,
    pipe: Any = None,
    judge: Path | None = None,
    **options: Any,
) -> dict[str, float]:
    """Share of pictures whose colour, object and background are those of the prompt.

    Prompts cycle through a seeded shuffle of all triples, those held out of training included. The weights are the
    folder's float16 ones; a CPU computes with them in float32. ``pipe`` is the folder's pipeline where it is loaded,
    and where it is none of Stable Diffusion 1 or 2; ``judge`` the judge's file where it is not the folder's own;
    ``options`` are of the pipeline's call.
    """
    if pipe is None:
        precision = {"torch_dtype": torch.float16} if device.startswith("cuda") else {}
        pipe = StableDiffusionPipeline.from_pretrained(folder, **precision).to(device)
    pipe.set_progress_bar_config(disable=True)
    every = triples()
    order = np.random.default_rng(seed).permutation(np.arange(count) % len(every))
    wanted = [every[i] for i in order]
    drawing: dict[str, Any] = {"steps": steps, "guidance": guidance, "batch": batch, **options}
    images = draw(pipe, [prompt(*w) for w in wanted], list(range(count)), **drawing)
    verdict = load_judge(judge or judge_path(folder)).to(device).look(images)
    return {
        "object": _share(verdict.objects, [w[0] for w in wanted]),
        "colour": _share(verdict.colours, [w[1] for w in wanted]),
        "background": _share(verdict.backgrounds, [w[2] for w in wanted]),
        "images": count,
        "steps": steps,
        "guidance_scale": guidance,
        **options,
    }


def _share(seen: list[str], wanted: list[str]) -> float:
    return float(np.mean([a == b for a, b in zip(seen, wanted, strict=True)]))
