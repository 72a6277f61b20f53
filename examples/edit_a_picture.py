"""A source picture and two edits of it by Free-Prompt-Editing: the targets take the source's self-attention maps."""

import argparse
from pathlib import Path

import torch

from fpe_pipeline import FreePromptPipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path, default=Path("out/examples"), help="where pictures are written")
parser.add_argument("steps", nargs="?", type=int, default=10, help="denoising steps (default 10)")
given = parser.parse_args()
folder, steps = given.folder, given.steps

pipe = FreePromptPipeline.from_pretrained("embedded")
result = pipe(
    "a photo of a red car on the beach",
    ["a photo of a blue car on the beach", "a photo of a red car in the snow"],
    self_replace_steps=0.8,  # of the steps, from the first on
    num_inference_steps=steps,
    generator=torch.Generator().manual_seed(0),
)
result.save(folder / "edit_a_picture")  # source.png, target-1.png, target-2.png, grid.png
print(result.report.explain())
