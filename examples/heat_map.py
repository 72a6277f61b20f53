"""Where words act: cross-attention of two words, and what one pixel looks at, over the picture."""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from fpe_pipeline import heat_maps
from fpe_pipeline.embedded import embedded_path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path, default=Path("out/examples"), help="where pictures are written")
parser.add_argument("steps", nargs="?", type=int, default=10, help="denoising steps (default 10)")
given = parser.parse_args()
folder, steps = given.folder / "heat_map", given.steps
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
