"""A picture from a file, inverted and edited. Without --photo, a scene is drawn that the embedded model knows."""

import argparse
from pathlib import Path

from PIL import Image

from fpe_pipeline import FreePromptPipeline, Inversion, ddim_scheduler
from fpe_pipeline.embedded.scenes.scenes import Scene, render

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path, default=Path("out/examples"), help="where pictures are written")
parser.add_argument("steps", nargs="?", type=int, default=10, help="denoising steps (default 10)")
parser.add_argument("--photo", help="a picture of yours (default: a drawn one)")
parser.add_argument("--source", default="a photo of a red car on the beach", help="what it shows, in words")
parser.add_argument("--target", action="append", help="what it is to show instead; repeat for more")
given = parser.parse_args()
folder, steps = given.folder / "edit_a_photo", given.steps
folder.mkdir(parents=True, exist_ok=True)

pipe = FreePromptPipeline.from_pretrained("embedded")
pipe.scheduler = ddim_scheduler(pipe.scheduler)  # inversion runs DDIM backwards
photo = given.photo
if photo is None:
    photo = folder / "photo.png"
    Image.fromarray(render(Scene("car", "red", "beach", seed=3), pipe.native_size[0]).image).save(photo)

inversion = pipe.invert(photo, given.source, method="direct", num_inference_steps=steps)
inversion.save(folder / "photo.safetensors")

again = Inversion.load(folder / "photo.safetensors")  # any time later, with the same model and scheduler
targets = given.target or ["a photo of a green car on the beach", "a photo of a red boat on the beach"]
result = pipe(inversion=again, target_prompt=targets)
result.save(folder / "edits")
print(f"the source is the photo: {result.source.size}, and {len(result.targets)} edits lie in {folder / 'edits'}")
