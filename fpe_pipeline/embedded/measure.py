"""How well a model folder draws what its prompts say, as its judge sees it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from .judge import load_judge
from .scenes.scenes import prompt, triples

__all__ = ["draw", "measure_generation", "noise"]


def noise(shape: tuple[int, int, int], seeds: list[int]) -> torch.Tensor:
    """Starting latents ``[len(seeds), *shape]``, each from a CPU generator of its own: the same on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def draw(
    pipe: StableDiffusionPipeline, prompts: list[str], seeds: list[int], *, steps: int, guidance: float, batch: int = 32
) -> list[Image.Image]:
    """One picture for each prompt and seed, many at a time."""
    config = pipe.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        latents = noise(shape, seeds[start : start + batch]).to(pipe.device, pipe.unet.dtype)
        chosen = prompts[start : start + batch]
        images += pipe(chosen, latents=latents, num_inference_steps=steps, guidance_scale=guidance).images
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
    pipe: StableDiffusionPipeline | None = None,
) -> dict[str, float]:
    """Share of pictures whose colour, object and background are those of the prompt.

    Prompts cycle through a seeded shuffle of all triples, those held out of training included. The weights are the
    folder's float16 ones; a CPU computes with them in float32. ``pipe`` is the folder's pipeline where it is loaded.
    """
    if pipe is None:
        precision = {"torch_dtype": torch.float16} if device.startswith("cuda") else {}
        pipe = StableDiffusionPipeline.from_pretrained(folder, **precision).to(device)
    pipe.set_progress_bar_config(disable=True)
    every = triples()
    order = np.random.default_rng(seed).permutation(np.arange(count) % len(every))
    wanted = [every[i] for i in order]
    images = draw(pipe, [prompt(*w) for w in wanted], list(range(count)), steps=steps, guidance=guidance, batch=batch)
    verdict = load_judge(folder / "judge.safetensors").to(device).look(images)
    return {
        "object": _share(verdict.objects, [w[0] for w in wanted]),
        "colour": _share(verdict.colours, [w[1] for w in wanted]),
        "background": _share(verdict.backgrounds, [w[2] for w in wanted]),
        "images": count,
        "steps": steps,
        "guidance_scale": guidance,
    }


def _share(seen: list[str], wanted: list[str]) -> float:
    return float(np.mean([a == b for a, b in zip(seen, wanted, strict=True)]))
