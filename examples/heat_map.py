"""Where words act: cross-attention of two words, and what one pixel looks at, over the picture."""

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from fpe_pipeline import heat_maps
from fpe_pipeline.embedded import embedded_path

folder, steps = Path(*sys.argv[1:2] or ["out/examples"]) / "heat_map", int(*sys.argv[2:3] or [10])
folder.mkdir(parents=True, exist_ok=True)

pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
size = pipe.unet.config.sample_size * pipe.vae_scale_factor
with heat_maps(pipe, ["car", "beach"], pixels=[(size // 2, size // 2)]) as maps:
    image = pipe(
        "a photo of a red car on the beach", num_inference_steps=steps, generator=torch.Generator().manual_seed(0)
    ).images[0]
for word in ("car", "beach"):
    maps.overlay(maps.word(word), image).save(folder / f"{word}.png")
maps.overlay(maps.pixel((size // 2, size // 2)), image).save(folder / "middle.png")
image.save(folder / "image.png")
