"""What was made before modules moved is still read, and gives the same pictures.

``tests/data/embedded_128`` was made by the last version whose modules lay in one folder, with the model that it
shipped: ``fpe edit --steps 4 --no-control --size 48x48``, and ``pipe.record(SOURCE, num_inference_steps=2, height=32,
width=32, max_tokens=1024, self_replace_steps=0.5)`` from ``torch.Generator().manual_seed(0)``, with the latents that
``pipe.edit`` made of it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from safetensors.torch import load_file

from fpe_pipeline import FreePromptPipeline, Recording
from fpe_pipeline.cli import main
from fpe_pipeline.models.sources import find_model
from fpe_pipeline.runs.run import read_record

DATA = Path(__file__).parents[2] / "data" / "embedded_128"
RUN = DATA / "run" / "run.json"
TARGET = "a photo of a blue car on the beach"


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_run_repeats(tmp_path):
    settings, record = read_record(RUN)
    assert (settings.model, settings.steps, settings.size) == ("embedded", 4, (48, 48))
    assert main(["edit", "--from", str(RUN), "--quiet", "-o", str(tmp_path)]) == 0
    for name in ("source.png", "target-1.png"):
        assert np.abs(pixels(tmp_path / name) - pixels(RUN.parent / name)).max() <= 1  # rounded elsewhere, a grey value
    made = json.loads((tmp_path / "run.json").read_text())
    assert made["settings"] == record["settings"]
    assert made["model"]["identity_sha256"] == record["model"]["identity_sha256"]


def test_a_recording_is_edited():
    made_with = json.loads(RUN.read_text())["versions"]["transformers"]
    if transformers.__version__ != made_with:
        pytest.skip(f"the recording was made with transformers {made_with}, which writes itself into configurations")
    pipe = FreePromptPipeline.from_pretrained("embedded")
    pipe.set_progress_bar_config(disable=True)
    made = pipe.edit(Recording.load(DATA / "recording"), TARGET, output_type="latent").images
    expected = load_file(DATA / "edited.safetensors")["latents"]
    assert (made - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("folder", "name"), [("models/embedded", "embedded"), ("models/earlier/embedded_80", "embedded-80")]
)
def test_the_folders_of_that_time_are_found(folder, name):
    assert find_model(f"/somewhere/site-packages/fpe_pipeline/{folder}") == find_model(name)
