"""A batch on Stable Diffusion XL: recordings and photos as on other UNets, with the model's own guidance."""

import numpy as np
import pytest
import torch
from PIL import Image

from fpe_pipeline.images.distance import distance
from fpe_pipeline.models.sources import find_model
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs.making import Loaded
from tests.pipeline.batches.conftest import batch, pictures, written
from tests.support.free_prompt_pipelines import free_prompt_xl_pipeline

SOURCE = "a photo of a red car"
LEVELS = 3


@pytest.mark.slow
def test_pictures_are_those_of_single_edits(pipe, tmp_path):
    free_prompt_xl_pipeline(pipe, torch.float32).save_pretrained(tmp_path / "xl")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "photo.png")
    rows = [{"name": name, "source": SOURCE, "target": SOURCE.replace("red", name)} for name in ("blue", "green")]
    rows += [
        {**rows[0], "name": "from-photo", "image": "photo.png"},
        {**rows[0], "name": "bad", "method": "consistedit"},
    ]
    jobs, said = written(tmp_path / "jobs.jsonl", rows), []
    finished = batch(jobs, tmp_path / "out", said, defaults={"model": str(tmp_path / "xl"), "steps": 3}, at_once=2)
    assert finished.failed.keys() == {"bad"}, finished.failed
    assert "is a UNet of SDXL's kind" in finished.failed["bad"]
    files = {path.rpartition("/")[2].removesuffix(".png"): path for path in pictures(tmp_path / "out")}
    loaded = runs.load_pipeline(find_model(str(tmp_path / "xl")), dtype=torch.float32, device="cpu")
    for name in ("green", "from-photo"):
        path = tmp_path / "out" / files[name]
        settings, _ = runs.read_record(path)
        assert settings.guidance == 5.0
        single = runs.execute(settings, loaded=Loaded(loaded, runs.identity(loaded))).edited[0]
        assert distance(single, Image.open(path)).levels <= LEVELS
