"""An ordinary diffusers pipeline that has been loaded already, edited inside a `with` block and restored after it."""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from fpe_pipeline import FreePromptEdit, MasaCtrlEdit, editing
from fpe_pipeline.embedded import embedded_path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path, default=Path("out/examples"), help="where pictures are written")
parser.add_argument("steps", nargs="?", type=int, default=10, help="denoising steps (default 10)")
given = parser.parse_args()
folder, steps = given.folder / "any_pipeline", given.steps
folder.mkdir(parents=True, exist_ok=True)

pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
prompts = ["a photo of a red car on the beach", "a photo of a blue car on the beach"]
edits = {
    "none": None,
    "free-prompt": FreePromptEdit(0.8, strength=0.7),  # a blend of the source's map and the target's own
    "masactrl": MasaCtrlEdit(start_step=2, start_layer=4),
}
for name, edit in edits.items():
    same_noise = [torch.Generator().manual_seed(0) for _ in prompts]
    if edit is None:
        images = pipe(prompts, generator=same_noise, num_inference_steps=steps).images
    else:
        with editing(pipe, edit) as session:
            images = pipe(prompts, generator=same_noise, num_inference_steps=steps).images
        print(name, session.explain(), sep="\n")
    images[1].save(folder / f"{name}.png")
