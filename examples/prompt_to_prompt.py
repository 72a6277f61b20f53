"""Prompt-to-Prompt: words take the places of words, one of them with a weight, and the background stays."""

import argparse
from pathlib import Path

import torch

from fpe_pipeline import FreePromptPipeline, LocalBlend, PromptToPromptEdit

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path, default=Path("out/examples"), help="where pictures are written")
parser.add_argument("steps", nargs="?", type=int, default=10, help="denoising steps (default 10)")
given = parser.parse_args()
folder, steps = given.folder, given.steps

pipe = FreePromptPipeline.from_pretrained("embedded")
source, target = "a photo of a red car on the beach", "a photo of a blue car on the beach"
edit = PromptToPromptEdit(
    [source, target],
    pipe.tokenizer,
    align="replace",  # "refine" for targets with more words than the source
    cross_replace_steps=0.8,
    self_replace_steps=0.4,
    weights={"blue": 2.0},
)
blend = LocalBlend([source, target], pipe.tokenizer, words=["car", "car"])  # outside, the source's latents
for name, chosen in {"weighted": edit, "blended": edit + blend}.items():
    result = pipe(source, target, edit=chosen, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    result.save(folder / "prompt_to_prompt" / name)
    print(name, result.report.explain(), sep="\n")
