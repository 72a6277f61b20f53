"""KV-Edit: keys and values of the source's background, whose latents stay the source's; in float64, recorded too."""

import numpy as np
import pytest
import torch

from fpe_pipeline import KVEdit, WordMask, editing
from tests.support.dense_joint import dense
from tests.support.flow_pipelines import FAMILIES, MADE, SOURCE, TARGET, edited_with, solving
from tests.support.slow_cases import few
from tests.support.tiny_pipelines import tiny_pipeline
from tests.support.tiny_transformers import draw, draw_flux

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-8
RUNS = {"sd3": draw, "flux": draw_flux}
SIZES = {"1 target": {}, "3 targets": {"prompts": 4}, "not square": {"size": (6, 12)}}


@pytest.fixture(scope="module")
def pipes(pipe):
    return {family: MADE[family](pipe) for family in FAMILIES}


def mask_of(height, width):
    """White but for a part of the lower right; tokens at its border are mostly on one side."""
    mask = np.ones((height * 8, width * 8), dtype=np.float32)
    mask[height * 4 + 6 :, width * 4 - 4 :] = 0
    return mask


def white(height, width):
    """By token whether it is the source's, written from the rule."""
    mask = torch.from_numpy(mask_of(height, width)).double()
    return (mask.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).mean((1, 3)) >= 0.5).double()


def half_of(row, rows, family):
    half = rows // 2 if family == "sd3" else rows
    return row // half * half


def reference(tiny, family, steps=range(4), parts="kv", pastes=True, **options):
    """Dense layers, and after every step the source's latents where the mask is white."""
    size = options.get("size", (8, 8))
    share = white(*size)

    def rule(row, rows):
        source = half_of(row, rows, family)
        return [(1.0, {f"{p}_image": (source, row, share.flatten()) for p in parts})] if row != source else None

    def paste(pipe, index, timestep, tensors):
        latents = tensors["latents"].clone()
        there = share.flatten()[:, None] if family == "flux" else torch.kron(share, torch.ones(2, 2).double())
        if pastes and index in steps:
            latents[1:] = torch.where(there.bool(), latents[:1], latents[1:])
        return {"latents": latents}

    with dense(tiny, rule, steps=steps):
        return RUNS[family](tiny, callback_on_step_end=paste, **options)


@pytest.mark.parametrize("options", few(SIZES, "3 targets"))
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_papers(pipes, family, options):
    tiny, size = pipes[family], options.get("size", (8, 8))
    with editing(tiny, KVEdit(mask=mask_of(*size))) as session:
        actual = RUNS[family](tiny, **options)
    assert (actual - reference(tiny, family, **options)).abs().max() <= EXACT
    assert all(steps == [0, 1, 2, 3] for steps in session.report().layers.values()) and session.report().layers
    plain, share = RUNS[family](tiny, **options), white(*size)
    kept = share.flatten()[:, None] if family == "flux" else torch.kron(share, torch.ones(2, 2).double())
    kept = kept.bool().expand_as(actual[0])
    assert all(torch.equal(row[kept], actual[0][kept]) for row in actual[1:])
    assert (actual[1:] - actual[:1])[:, ~kept].abs().amax(1).min() > 1e-4
    assert (actual - plain)[1:][:, ~kept].abs().max() > 1e-4


WRONG = {
    "keys alone": {"parts": "k"},
    "values alone": {"parts": "v"},
    "latents alone": {"parts": ""},
    "no latents": {"pastes": False},
    "a step less": {"steps": range(3)},
}


@pytest.mark.parametrize("wrong", few(WRONG, "keys alone", "no latents"))
@pytest.mark.parametrize("family", few(FAMILIES, "sd3"))
def test_other_rules_are_told_apart(pipes, family, wrong):
    with editing(pipes[family], KVEdit(mask=mask_of(8, 8))):
        actual = RUNS[family](pipes[family])
    assert (actual - reference(pipes[family], family, **wrong)).abs().max() > 1e-6


def test_steps(pipes):
    with editing(pipes["sd3"], KVEdit(mask=mask_of(8, 8), steps=(0.25, 0.75))):
        actual = draw(pipes["sd3"])
    assert (actual - reference(pipes["sd3"], "sd3", steps=(1, 2))).abs().max() <= EXACT


@pytest.mark.parametrize("solver", few(["euler", "fireflow"], "euler"))
@pytest.mark.parametrize("family", few(FAMILIES, "flux"))
def test_of_inverted_images_and_their_recordings(pipe, family, solver):
    """The recording keeps image keys and values within its budget, of any mask; its edits are those of full runs."""
    tiny = solving(edited_with(MADE[family](pipe)), solver)
    photo = torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 4, "max_sequence_length": 12, "height": 48, "width": 80}
    inversion = tiny.invert(photo, SOURCE, **options)
    edit, other = KVEdit(mask=mask_of(6, 10)), KVEdit(mask=1 - mask_of(6, 10))
    layers, tokens, halves = len(edit.select(_sites(tiny))), 15, 1 if family == "flux" else 2
    calls = len(tiny.scheduler.timesteps)
    itemsize, latents = 8, (calls + 1) * 6 * 10 * 16
    budget = itemsize * (layers * calls * halves * 2 * tokens * 16 + latents)  # two parts of 2 heads of 8
    with pytest.raises(ValueError, match="more than budget_bytes"):
        tiny.record(inversion=inversion, edit=edit, max_sequence_length=12, budget_bytes=budget - 1)
    recording = tiny.record(inversion=inversion, edit=edit, max_sequence_length=12, budget_bytes=budget)
    assert {part.name for kept in recording.contents.values() for part in kept} == {"image-key", "image-value"}
    for one in (edit, other):
        full = tiny(inversion=inversion, target_prompt=TARGET, edit=one, max_sequence_length=12, output_type="latent")
        replayed = tiny.edit(recording, TARGET, edit=one, output_type="latent")
        assert (replayed.images - full.images[1:]).abs().max() <= EXACT
    assert (replayed.images - full.images[:1]).abs().max() > 1e-4


def _sites(tiny):
    from fpe_pipeline.models.adapters.families import adapter_of

    return adapter_of(tiny).sites


class TestRefusals:
    def test_masks(self, pipe):
        with pytest.raises(ValueError, match="pass mask="):
            KVEdit()
        with pytest.raises(ValueError, match="pass mask="):
            KVEdit(mask=WordMask("a red car", "car", pipe.tokenizer))

    def test_models(self, pipe):
        with pytest.raises(ValueError, match="KVEdit edits layers in which"):
            editing(tiny_pipeline(pipe), KVEdit(mask=mask_of(8, 8)))

    def test_proportions(self, pipes):
        flux, message = pipes["flux"], "a mask of the image's proportions"
        with pytest.raises(ValueError, match=message), editing(flux, KVEdit(mask=mask_of(8, 8))):
            draw_flux(flux, size=(6, 12))
