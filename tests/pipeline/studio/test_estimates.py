"""What is said of a run before it begins: its memory to the byte, its time from how fast the model has been."""

import dataclasses
import math

import pytest
import torch

from benchmarks.memory import peak_bytes
from fpe_pipeline.studio import estimates
from fpe_pipeline.studio import models as models_module
from tests.pipeline.studio.conftest import last
from tests.support.tiny_cli import TARGET


@pytest.fixture(scope="module")
def pipe(models, tiny_folder):
    with models.use(tiny_folder) as loaded:
        return loaded.pipe


@pytest.fixture(scope="module")
def pace(pipe):
    return estimates.ModelPace(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (256, 128)])
def test_memory_is_what_is_allocated(pipe, pace, size):
    width, height = (side // pipe.vae_scale_factor for side in size)
    latents = torch.randn(4, 4, height, width)
    words = torch.randn(4, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        step = peak_bytes(lambda: pipe.unet(latents, torch.tensor(5.0), words))
        decoded = peak_bytes(lambda: pipe.vae.decode(latents[:2]))
    assert pace._shapes.step(4, size).peak == pytest.approx(step, rel=0.02)
    assert pace._shapes.decode(2, size).peak == pytest.approx(decoded, rel=0.02)


@pytest.mark.slow
def test_maps_are_counted_and_not_held(pace):
    small, large = (pace._shapes.step(2, (side, side)) for side in (128, 256))
    assert large.maps > 8 * small.maps, "maps grow with the square of the pixels"
    assert large.peak < 5 * small.peak, "and memory does not"


@pytest.mark.slow
def test_weights_are_those_of_every_part(pipe, pace):
    modules = (pipe.unet, pipe.vae, pipe.text_encoder)
    parameters = sum(p.nbytes for module in modules for p in module.parameters())
    assert parameters <= pace._shapes.weights < 1.01 * parameters


@pytest.mark.slow
def test_time_follows_the_work(desk, visitor, values):
    made = last(desk.generate(visitor, True, *values(steps=4, targets=TARGET))).made
    pace, settings = desk.models.pace(made.model), made.run.settings
    pace.learn(settings, 3.0)
    assert pace.of(settings).seconds == pytest.approx(3.0)
    assert 5 < pace.of(settings.with_values(steps=8)).seconds < 6
    assert pace.of(settings.with_values(control=False)).seconds < 2.5
    assert pace.of(settings.with_values(size=(128, 128))).seconds > 9
    assert desk.estimate(*values(steps=4, targets=TARGET)).startswith("about 3 s and ")


@pytest.mark.slow
def test_before_the_first_run_it_is_known_too(pipe, desk, values):
    fresh = estimates.ModelPace(pipe).of(desk.settings(values(steps=50)))
    assert fresh.seconds > 0 and math.isfinite(fresh.seconds) and fresh.working > 0 and fresh.maps > 0
    assert "of memory" in str(fresh) and str(dataclasses.replace(fresh, seconds=0.2)).startswith("about 1 s")


def test_what_cannot_be_made_has_no_estimate(desk, values):
    with desk.models.use(values()[0]):
        pass
    for fields in ({"steps": 0}, {"size": "63x64"}, {"size": "large"}, {"steps": 10**6}, {"targets": " "}):
        assert desk.estimate(*values(**fields)) == "", fields
    unloaded = ["embedded-80", *values()[1:]]
    assert desk.estimate(*unloaded) == ""


@pytest.mark.slow
def test_whoever_asks_while_a_model_is_used_does_not_wait_for_long(tiny_folder):
    alone = models_module.Models((tiny_folder,), device="cpu")
    with alone.use(tiny_folder):
        assert alone.pace(tiny_folder, wait=0.0) is None
    assert alone.pace(tiny_folder) is not None


def test_a_model_whose_pace_cannot_be_found_is_served_all_the_same(tiny_folder, monkeypatch, caplog):
    monkeypatch.setattr(models_module, "ModelPace", lambda pipe: pipe.unet(planted=1))
    alone = models_module.Models((tiny_folder,), device="cpu")
    with alone.use(tiny_folder) as loaded:
        assert loaded.pipe is not None
    assert alone.pace(tiny_folder) is None
    assert "cannot say beforehand" in caplog.text
