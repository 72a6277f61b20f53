"""The page with Stable Diffusion XL: its own guidance, what a run takes, words, photos, and pictures made again."""

import shlex

import pytest
import torch

from fpe_pipeline.app import cli
from fpe_pipeline.images.distance import distance
from fpe_pipeline.runs import run as runs
from fpe_pipeline.studio.copied import as_command
from fpe_pipeline.studio.desk import Desk
from fpe_pipeline.studio.models import Models
from fpe_pipeline.studio.requests import FIELDS, MOST_OPTIONS, defaults
from fpe_pipeline.studio.shapes import Shapes
from tests.pipeline.studio.conftest import last
from tests.support.free_prompt_pipelines import free_prompt_xl_pipeline
from tests.support.tiny_cli import OTHER, SOURCE, TARGET


@pytest.fixture(scope="module")
def desk(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    free_prompt_xl_pipeline(pipe).save_pretrained(folder)
    return Desk(Models((str(folder),), device="cpu"), tmp_path_factory.mktemp("out"))


def values_of(desk, **fields):
    (model,) = desk.models.names
    given = defaults((SOURCE, TARGET, OTHER), model) | {"steps": 2, "size": "32 x 24"} | fields
    return [model, *(given[name] for name in FIELDS), *[""] * MOST_OPTIONS]


@pytest.mark.slow
def test_generate_look_and_repeat(desk, tmp_path):
    visitor = desk.arrive()
    made = last(desk.generate(visitor, True, *values_of(desk, seed=3))).made
    assert made.run.settings.guidance == 5.0
    assert desk.estimate(*values_of(desk)).startswith("about ")
    assert last(desk.look(visitor)).made.maps.word("car").shape == (6, 8)
    command = shlex.split(as_command(made.run.settings).replace("\\\n", " "))
    assert cli.main([*command[1:], "--no-control", "--quiet", "-o", str(tmp_path)]) == 0
    settings, _ = runs.read_record(tmp_path / "target-1.png")
    assert settings.with_values(control=True) == made.run.settings


@pytest.mark.slow
def test_a_photo(desk, photo):
    visitor = desk.arrive()
    desk.receive_photo(visitor, photo)
    inverted = last(desk.invert(visitor, "direct", *values_of(desk))).made.recorded
    assert inverted.psnr == distance(inverted.cut, inverted.back).psnr
    made = last(desk.edit(visitor, "direct", *values_of(desk))).made
    assert made.run.photo.size == made.run.source.size


@pytest.mark.slow
def test_the_decoder_is_counted_in_the_dtype_in_which_it_computes(pipe):
    tiny = free_prompt_xl_pipeline(pipe)
    half, brain, whole = (
        Shapes(tiny.to(dtype)).decode(1, (32, 24)).peak for dtype in (torch.float16, torch.bfloat16, torch.float32)
    )
    assert half == whole == 2 * brain
