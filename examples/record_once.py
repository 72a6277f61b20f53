"""A source is denoised once and kept in a folder; edits of it denoise the targets alone."""

import argparse
import tempfile
from pathlib import Path

import torch

from fpe_pipeline import FreePromptPipeline, PromptToPromptEdit

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path, default=Path("out/examples"), help="where pictures are written")
parser.add_argument("steps", nargs="?", type=int, default=10, help="denoising steps (default 10)")
given = parser.parse_args()
folder, steps = given.folder / "record_once", given.steps
folder.mkdir(parents=True, exist_ok=True)

pipe = FreePromptPipeline.from_pretrained("embedded")
source = "a photo of a red car on the beach"
kept = Path(tempfile.mkdtemp(dir=folder)) / "recording"
recording = pipe.record(
    source,
    edit=PromptToPromptEdit([source, source], pipe.tokenizer),  # its targets are not known yet
    placement=kept,
    budget_bytes=1 << 30,
    num_inference_steps=steps,
    generator=torch.Generator().manual_seed(0),
)
print(recording)
for colour in ("blue", "green", "yellow"):
    target = f"a photo of a {colour} car on the beach"
    edit = PromptToPromptEdit([source, target], pipe.tokenizer)
    pipe.edit(kept, target, edit=edit).save(folder / colour)
