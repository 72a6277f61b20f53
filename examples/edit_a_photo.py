"""A picture from a file, inverted and edited. Without one of yours, a scene is drawn that the embedded model knows."""

import argparse
from pathlib import Path

from PIL import Image

from fpe_pipeline import FreePromptPipeline, Inversion, ddim_scheduler
from fpe_pipeline.embedded.scenes.scenes import Scene, render

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path, default=Path("out/examples"), help="where pictures are written")
parser.add_argument("steps", nargs="?", type=int, default=10, help="denoising steps (default 10)")
given = parser.parse_args()
folder, steps = given.folder / "edit_a_photo", given.steps
folder.mkdir(parents=True, exist_ok=True)

pipe = FreePromptPipeline.from_pretrained("embedded")
pipe.scheduler = ddim_scheduler(pipe.scheduler)  # inversion runs DDIM backwards
photo = folder / "photo.png"
Image.fromarray(render(Scene("car", "red", "beach", seed=3), pipe.native_size[0]).image).save(photo)

inversion = pipe.invert(photo, "a photo of a red car on the beach", method="direct", num_inference_steps=steps)
inversion.save(folder / "photo.safetensors")

again = Inversion.load(folder / "photo.safetensors")  # any time later, with the same model and scheduler
targets = ["a photo of a green car on the beach", "a photo of a red boat on the beach"]
result = pipe(inversion=again, target_prompt=targets)
result.save(folder / "edits")
print(f"the source is the photo: {result.source.size}, and {len(result.targets)} edits lie in {folder / 'edits'}")
